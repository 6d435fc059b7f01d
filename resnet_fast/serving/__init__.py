"""Models behind NVIDIA Triton Inference Server.

repository.py      write_repository: from a PyTorch classifier to a folder that the server reads
config.py          config.pbtxt, label file and warm-up of each model in it
files/             what is copied there: the Python backend's model.py, and templates of the rest
server.py          the server's program on this machine, and a process of it
load.py            requests from several clients at once, and how long they take
"""

from resnet_fast.serving.repository import Repository, write_repository
from resnet_fast.serving.server import Server

__all__ = ["Repository", "Server", "write_repository"]
