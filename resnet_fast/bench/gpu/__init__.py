"""The first hour on a machine with a GPU, in ten minutes: is everything right, repeatable, and how fast is it?

cases.py      what is checked: calls of the fused ops and training steps of blocks
parts.py      the checks and measurements, each in a process of its own: ``python -m resnet_fast.bench.gpu.parts``
peers.py      one of them: single convolutions beside eager PyTorch, cuDNN and torch.compile
suite.py      all parts one after the other, within a time limit
report.py     JSON and HTML

It also runs with ``--device cpu``, which says nothing about a GPU, but shows that the suite itself works.
"""

from resnet_fast.bench.gpu.report import write_report
from resnet_fast.bench.gpu.suite import Suite, run

__all__ = ["Suite", "run", "write_report"]
