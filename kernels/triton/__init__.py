"""GPU (NVIDIA and AMD): every op as Triton kernels, each in a file of its own together with its plan.

    table.py        the ops, the files of their kernels, and which cases are covered
    device.py       which GPU it is, and what it can do
    plan.py         launches that are decided and not started; operands.py: the tensors that they are given
    prepared.py     launches kept, so that a repeated call is little Python
    pack.py         the shapes in which the kernels want to read weights and images
    tiles.py        tile sizes per architecture and shape class, read from tiles/*.json
    cost_model/     the static model that these were made with
    tuning/         what was measured: our tiles against PyTorch's convolutions

    measured.py     convolutions of inference: what was measured decides, PyTorch's own included
    forward.py      convolutions: which of the following kernels serves one; problem.py, convolution.py: one of them
    gemm.py, conv.py, gemm_descriptor.py, conv_descriptor.py (descriptor.py), split_k.py, epilogue.py
    pool.py, classifier.py, chain.py        what else there is in a network
    prologue.py, statistics.py, gram.py, expand.py, tail.py     what training adds to the forward pass
    dgrad.py, wgrad.py, tail_backward.py, gradient_epilogue.py    the backward pass
    conv_quantised.py, requantise.py, quantise.py    8-bit numbers

Importing this package imports neither Triton nor a kernel; the first call of an op does.
"""
