"""Kernels of a few lines, written by hand, for the tests of the machine itself."""

from collections.abc import Sequence

import numpy as np
import torch

from tests.ptx.launching import Code, execute
from tests.ptx.registers import width
from tests.ptx.tensor_maps import TensorMap

_MODULE = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry snippet({parameters}
)
.reqntid {threads}
{{
\t.reg .pred \t%p<16>;
\t.reg .b16 \t%rs<16>;
\t.reg .b32 \t%r<32>;
\t.reg .b64 \t%rd<16>;
{body}
\tret;
}}
"""


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    grid: tuple[int, ...] = (1,),
    shared: int = 4096,
    maps: Sequence[TensorMap] = (),
) -> None:
    """Execute the body. Each array is a tensor, whose address %rd1, %rd2, ... hold; %r1 is the thread.

    Tensor maps are parameters of the names map_0, map_1, ... What the body stores is in the arrays afterwards.
    """
    declared = [f"\n\t.param .u64 .ptr .global .align 1 snippet_param_{i}" for i in range(len(arrays))]
    declared += [f"\n\t.param .align 64 .b8 map_{i}[128]" for i in range(len(maps))]
    parameters = ",".join(declared)
    loads = [f"\tld.param.b64 \t%rd{i + 1}, [snippet_param_{i}];" for i in range(len(arrays))]
    lines = ["\tmov.u32 \t%r1, %tid.x;", *loads, *(f"\t{line.strip()}" for line in body.strip().splitlines())]
    code = Code(_MODULE.format(parameters=parameters, threads=threads, body="\n".join(lines)))
    # A tensor of bytes: where it ends is looked at to the byte.
    tensors = [torch.from_numpy(one.reshape(-1).view(np.uint8)) for one in arrays]
    execute(code, grid, [*tensors, *maps], shared, tensors)


_LETTERS = {2: "rs", 4: "r", 8: "rd"}


def _register(type_name: str, number: int) -> str:
    return f"%p{number}" if type_name == "pred" else f"%{_LETTERS[max(width(type_name), 2)]}{number}"


def apply(opcode: str, sources: tuple[str, ...], result: str, operands: list[list[int]]) -> list[int]:
    """One opcode, of as many threads as there are operands: these, and the results, are bits.

    Every number travels in 64 bits, of which a register takes the lowest.
    """
    count = len(operands[0])
    inputs = [np.array([bits % 2**64 for bits in one], np.uint64) for one in operands]
    out = np.zeros(count, np.uint64)
    lines = ["mul.wide.u32 %rd10, %r1, 8;"]
    given = [_register(type_name, 5 + i) for i, type_name in enumerate(sources)]
    for i, (register, type_name) in enumerate(zip(given, sources), 1):
        lines += [f"add.s64 %rd11, %rd{i}, %rd10;", "ld.global.b64 %rd12, [%rd11];"]
        if type_name == "pred":
            lines.append(f"setp.ne.b64 {register}, %rd12, 0;")
        else:
            parts = [register] + ["_"] * (8 // max(width(type_name), 2) - 1)
            lines.append(f"mov.b64 {{{', '.join(parts)}}}, %rd12;" if len(parts) > 1 else f"mov.b64 {register}, %rd12;")
    made = _register(result, 14)
    lines.append(f"{opcode} {', '.join([made, *given])};")
    if result == "pred":
        lines.append(f"selp.b64 %rd13, 1, 0, {made};")
    elif made.startswith("%rd"):
        lines.append(f"mov.b64 %rd13, {made};")
    else:
        zero = made.rstrip("0123456789") + "15"
        bits = 8 * max(width(result), 2)
        parts = [made] + [zero] * (64 // bits - 1)
        lines += [f"mov.b{bits} {zero}, 0;", f"mov.b64 %rd13, {{{', '.join(parts)}}};"]
    lines += [f"add.s64 %rd11, %rd{len(sources) + 1}, %rd10;", "st.global.b64 [%rd11], %rd13;"]
    run("\n".join(lines), *inputs, out, threads=count)
    return out.tolist()
