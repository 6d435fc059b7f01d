"""Assembly as text -> instructions, and which of them make up the main loop.

The main loop is found in the flow of control, not in the order of the text: compilers move what rarely runs, such as
waiting once more for a barrier, behind the end of the kernel, and jump back from there into the middle of a loop.
"""

import itertools
import re
from typing import NamedTuple, Optional

# "        /*0120*/              @P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9][\w.]*)([^;]*);", re.MULTILINE)
_SASS_BYTES = 16  # of an instruction, since Volta
# ".LBB0_3:" or "\tv_add_u32 v1, v2, v3"
_AMD = re.compile(r"^(?:(\.\w+):|[ \t]+([a-z]\w*_\w+)([^;\n]*))", re.MULTILINE)


class Instruction(NamedTuple):
    """name: with modifiers, "LDG.E.128". target: the position to which it may branch. goes_on: or to the next one."""

    name: str
    operands: str
    target: Optional[int] = None
    goes_on: bool = True


class Loop(NamedTuple):
    """The innermost loops that multiply, together. Unrolled: all from the first product to the last.

    Loads from global memory of 16 bytes or more per thread, and of less: those in these loops. If other warps load
    than multiply, those in their innermost loops. Unrolled: all before the last product.
    """

    instructions: int
    products: int
    rolled: bool
    wide_loads: int
    narrow_loads: int


class Dialect(NamedTuple):
    """How an assembly language names what is counted. Patterns of the beginning of "name operands"."""

    tensor_core: re.Pattern
    multiply_add: re.Pattern  # the product of float32 where tensor cores have none
    load: re.Pattern
    wide: re.Pattern
    copy: re.Pattern
    tiny: re.Pattern
    local: re.Pattern


NVIDIA = Dialect(
    # mma.sync's, sm_90's wgmma's and sm_100's tcgen05's, of halves and TF32, 8-bit integers and 8-bit floats.
    tensor_core=re.compile(r"(H|I|Q|O|D)G?MMA\b|UTC(H|I|Q|O)MMA\b"),
    multiply_add=re.compile(r"FFMA2?\b"),
    load=re.compile(r"LDG\b|LDGSTS\b|UTMALDG\b|UBLKCP\b"),
    wide=re.compile(r"\S+\.(128|256)\b|UTMALDG\b|UBLKCP\b"),
    copy=re.compile(r"LDGSTS\b"),
    tiny=re.compile(r"\S+\.[US](8|16)\b"),
    local=re.compile(r"(LDL|STL)\b"),
)
AMD = Dialect(
    tensor_core=re.compile(r"v_(mfma|smfmac|wmma|swmmac)_"),
    multiply_add=re.compile(r"v_(pk_|dual_)?fma\w*_f32"),
    load=re.compile(r"(buffer|global|flat)_load_"),
    wide=re.compile(r"\S+_(dwordx4|b128)\b"),
    copy=re.compile(r"\S+_load_lds_|buffer_load_.*\blds$"),
    tiny=re.compile(r"\S+(byte|short|d16|[iu](8|16)\b)"),
    local=re.compile(r"scratch_(load|store)_"),
)


def sass(text: str, sizes: list[int]) -> list[list[Instruction]]:
    """What NVIDIA's disassembler prints of kernels that lie one behind the other; ``sizes`` are theirs, in bytes."""
    found = _SASS.findall(text)
    assert len(found) * _SASS_BYTES == sum(sizes), f"{len(found)} instructions in {sum(sizes)} bytes"
    kernels = []
    first = 0
    for size in sizes:
        last = first + size // _SASS_BYTES
        kernels.append([_sass_instruction(*found[i], first, last) for i in range(first, last)])
        first = last
    return kernels


def _sass_instruction(predicate: str, name: str, operands: str, first: int, last: int) -> Instruction:
    """first, last: position of the kernel's first instruction and of the next kernel's."""
    opcode, goes_on = name.split(".")[0], bool(predicate)
    # On sm_80 a call, which never returns, also leaves loops.
    if opcode not in ("BRA", "CALL"):
        return Instruction(name, operands, None, goes_on or opcode not in ("EXIT", "RET", "BRX", "BRXU"))
    *predicates, target = operands.split(",")
    address = re.search(r"0x([0-9a-f]+)", target)
    position = int(address[1], 16) // _SASS_BYTES if address else -1
    if not first <= position < last:
        assert opcode == "CALL", f"a branch out of the kernel: {name}{operands}"
        return Instruction(name, operands)
    return Instruction(name, operands, position - first, goes_on or bool(predicates) or opcode == "CALL")


def amdgcn(text: str) -> list[Instruction]:
    """AMD's assembly, as LLVM writes it."""
    labels: dict[str, int] = {}
    found = []
    for label, name, operands in _AMD.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((name, operands.strip()))
    code = []
    for name, operands in found:
        branch = name.startswith(("s_branch", "s_cbranch"))
        ends = name.startswith(("s_branch", "s_endpgm", "s_setpc"))
        code.append(Instruction(name, operands, labels[operands] if branch else None, not ends))
    return code


def is_a(kind: re.Pattern, one: Instruction) -> bool:
    return kind.match(f"{one.name} {one.operands}") is not None


def main_loop(code: list[Instruction], dialect: Dialect, product: re.Pattern) -> Loop:
    """Of a kernel without products: all of it."""
    products = {i for i, one in enumerate(code) if is_a(product, one)}
    loads = {i for i, one in enumerate(code) if is_a(dialect.load, one)}
    loops = natural_loops(code)
    inside = _innermost(loops, products)
    if inside:
        loading = inside if inside & loads else _innermost(loops, loads)
    elif products:
        inside = set(range(min(products), max(products) + 1))
        loading = set(range(max(products)))
    else:
        inside = loading = set(range(len(code)))
    loads &= loading
    wide_loads = sum(is_a(dialect.wide, code[i]) for i in loads)
    return Loop(
        instructions=sum(code[i].name != "NOP" for i in inside),
        products=len(products & inside),
        rolled=any(products & loop for loop in loops),
        wide_loads=wide_loads,
        narrow_loads=len(loads) - wide_loads,
    )


def _innermost(loops: list[set[int]], wanted: set[int]) -> set[int]:
    """Of the loops with a wanted instruction in them, those that contain no other such loop; united."""
    with_some = [loop for loop in loops if loop & wanted]
    return set().union(*(loop for loop in with_some if not any(other < loop for other in with_some)))


def natural_loops(code: list[Instruction]) -> list[set[int]]:
    """The positions of the instructions of every loop, one loop for every header.

    A loop is what can reach a jump back to the header without passing through the header, which every way into the
    loop leads through (Aho, Lam, Sethi, Ullman, Compilers, section 9.6).
    """
    blocks = _basic_blocks(code)
    number = {block.start: b for b, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for block in blocks:
        last = code[block.stop - 1]
        next_ones = [] if last.target is None else [number[last.target]]
        if last.goes_on and block.stop < len(code):
            next_ones.append(number[block.stop])
        successors.append(next_ones)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for b, next_ones in enumerate(successors):
        for successor in next_ones:
            predecessors[successor].append(b)

    dominators = _dominators(successors, predecessors)
    bodies: dict[int, set[int]] = {}
    for b, next_ones in enumerate(successors):
        for header in next_ones:
            if dominators[b] >> header & 1:
                body = bodies.setdefault(header, {header})
                waiting = [b]
                while waiting:
                    one = waiting.pop()
                    if one not in body:
                        body.add(one)
                        waiting += predecessors[one]
    return [set().union(*(blocks[b] for b in body)) for body in bodies.values()]


def _basic_blocks(code: list[Instruction]) -> list[range]:
    starts = {0, len(code)}
    for i, one in enumerate(code):
        if one.target is not None:
            starts.add(one.target)
        if one.target is not None or not one.goes_on:
            starts.add(i + 1)
    ordered = sorted(starts)
    return [range(first, last) for first, last in itertools.pairwise(ordered)]


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> list[int]:
    """For each block, those that every way to it leads through, as bits. Indirect jumps start a way of their own."""
    roots: list[int] = []
    reached: set[int] = set()
    for b in range(len(successors)):
        if b not in reached:
            roots.append(b)
            reached |= _reachable(b, successors)
    everything = (1 << len(successors)) - 1
    dominators = [everything] * len(successors)
    for root in roots:
        dominators[root] = 1 << root
    changed = True
    while changed:
        changed = False
        for b in range(len(successors)):
            if b in roots:
                continue
            common = everything
            for predecessor in predecessors[b]:
                common &= dominators[predecessor]
            common |= 1 << b
            changed |= common != dominators[b]
            dominators[b] = common
    return dominators


def _reachable(start: int, successors: list[list[int]]) -> set[int]:
    found = {start}
    waiting = [start]
    while waiting:
        for successor in successors[waiting.pop()]:
            if successor not in found:
                found.add(successor)
                waiting.append(successor)
    return found
