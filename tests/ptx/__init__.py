"""A machine that executes PTX, the code that Triton emits for NVIDIA's GPUs, in NumPy, on a CPU.

    parse        text -> instructions
    machine      programs of a grid in lockstep: registers, control flow, barriers
    arithmetic   what an instruction makes of numbers in registers; conversions is its part between types
    transfer     loads, stores, asynchronous copies and exchanges between the threads of a warp
    bulk         the copy engine and its mbarriers; tensor_maps is what it is given
    halves       pairs of float16
    matrices     ldmatrix, stmatrix and mma
    wgmma        asynchronous products of warpgroups
    tensors      global memory: tensors, and nothing around them
    shared       shared memory: which bytes hold something, and races
    launching    runs what our plans launch, in place of a GPU

    python -m tests.ptx FILE.ptx     the instructions of a file, and which of them the machine does not know

Semantics are those of NVIDIA's "Parallel Thread Execution ISA", whose sections are named beside them. What the machine
does not know, it refuses. It refuses as well what hardware would let pass: misaligned accesses, accesses outside a
tensor, reads of shared memory that nothing was written to, races between warps.
"""
