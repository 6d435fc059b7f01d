"""Which kernel serves a convolution on this GPU, by measurement.

planner.py    the candidates, and which of them was measured to be the fastest
measuring.py  measures them
first_call.py where nobody has, when a shape is first met
cudnn.py      those of them that are not ours: PyTorch's own convolutions
"""
