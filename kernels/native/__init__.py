"""CPU: kernels of our own in C++, called through ctypes.

inference.py   the inference ops
training.py    the primitives of training; wgrad.py and passes.py have those that are no convolutions of images
planner.py     which algorithm serves a convolution
library.py     the compiled library, whose interface is in abi.py
src/           its sources
"""
