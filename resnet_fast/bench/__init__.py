"""The same model and images under several libraries, side by side.

providers/         one library each: how it loads the model, with which settings
runner.py          every provider in a process of its own, in alternating rounds
worker.py          that process
apart.py           the environment of those that cannot share this one
workload.py        what it gets: model, images and the right result, as files
machine.py         what the numbers were taken on
"""

from resnet_fast.bench.runner import Bench, Measurement, measure, unavailable
from resnet_fast.bench.workload import prepare

__all__ = ["Bench", "Measurement", "measure", "prepare", "unavailable"]
