"""The backward kernels of training, compiled for their targets from the very plans that would be launched."""
