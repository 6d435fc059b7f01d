"""The same model and images under several libraries, side by side; and what a model must move, counted.

providers/            one library each: how it loads the model, with which settings
runner.py             every provider in a process of its own, in alternating rounds
worker.py             that process
peer_environment.py   the environment of those that cannot share this one
workload.py           what it gets: model, images and the right result, as files
training_step.py      a step, its results, and what it keeps for the backward pass
machine.py            what the numbers were taken on
norms.py              batch norms set so that what is measured is a fair case

traffic.py            the operations of a model, each with the bytes that it reads and writes
operands.py           the same of the primitives of a residual block
ledger.py             where they are entered
pipelines.py          the kernels that operations become: eager, compiled, ours
roofline.py           how long those would take on a GPU
roofline_chart.py     that drawn

gpu/                  the first hour on a machine with a GPU
"""

from resnet_fast.bench.runner import Bench, Measurement, measure, unavailable
from resnet_fast.bench.workload import prepare

__all__ = ["Bench", "Measurement", "measure", "prepare", "unavailable"]
