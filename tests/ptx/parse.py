"""From the text of a PTX module with one kernel to its instructions."""

import itertools
import re
from typing import NamedTuple, Optional, Union

# Bytes of a register, by the type that its declaration gives it.
REGISTER_BYTES = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}


class PtxError(Exception):
    """What the machine does not know, or what a GPU must not do; names the instruction."""


class Register(NamedTuple):
    name: str
    kind: str  # a key of REGISTER_BYTES


class Immediate(NamedTuple):
    """An integer; or a floating-point number, given by its bits."""

    value: int


class Special(NamedTuple):
    """A register that is read only, as %tid.x; or "_", which takes a result that nobody wants."""

    name: str


class Symbol(NamedTuple):
    """The address of a variable or parameter."""

    name: str


class Address(NamedTuple):
    base: Union[Register, Symbol]
    offset: int


class Element(NamedTuple):
    """``[map, {x, y, ...}]``: the corner of a box in the tensor of a tensor map, innermost coordinate first."""

    tensor_map: Register
    corner: "Vector"


class Vector(NamedTuple):
    items: tuple[Union[Register, Immediate, Special], ...]


class Label(NamedTuple):
    name: str


Operand = Union[Register, Immediate, Special, Symbol, Address, Element, Vector, Label]


class Instruction(NamedTuple):
    """``@guard name.modifiers operands;`` (Instruction Operands; Predicated Execution)."""

    line: int
    text: str
    guard: Optional[Register]
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


class Parameter(NamedTuple):
    name: str
    size: int  # bytes


class Kernel(NamedTuple):
    name: str
    target: str
    parameters: list[Parameter]
    threads: int
    instructions: list[Instruction]
    labels: dict[str, int]  # the index of the instruction that follows
    shared: dict[str, int]  # offsets of variables in shared memory


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.[ubsf](\d+)\b[^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)")
_BRACE = re.compile(r"[{}]")
_BLOCK = re.compile(r"^[ \t]*\{[ \t]*$(.*?)^[ \t]*\}[ \t]*$", re.MULTILINE | re.DOTALL)
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ELEMENT = re.compile(r"\[(%\w+),\s*\{([^}]*)\}\]$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%laneid$")
# Directives inside a kernel that say nothing about what it does.
_SILENT = (".loc", ".pragma", ".file")


def parse(text: str) -> Kernel:
    """The only kernel of a module."""
    plain = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    entries = list(_ENTRY.finditer(plain))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels in a module, not 1")
    (entry,) = entries
    name, parameters, directives = entry.groups()
    body = _body(plain, entry.end())
    target = re.search(r"^\.target\s+(\w+)", plain, re.MULTILINE)
    threads = re.search(r"\.reqntid\s+(\d+)\s*$", directives.strip())
    if target is None or threads is None:
        raise PtxError("a module without .target, or a kernel without .reqntid of one dimension")
    kinds: dict[str, str] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, statement in _statements(body, plain.count("\n", 0, entry.end()) + 1):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
        elif statement.startswith(".reg"):
            _declare(statement, kinds)
        elif statement.startswith("."):
            if not statement.startswith(_SILENT):
                raise PtxError(f"line {line}: unknown directive: {statement}")
        else:
            instructions.append(_instruction(line, statement, kinds))
    return Kernel(
        name, target[1],
        [Parameter(found[2], int(found[1]) // 8 * int(found[3] or 1)) for found in _PARAMETER.finditer(parameters)],
        int(threads[1]), instructions, labels, _shared(plain),
    )  # fmt: skip


def _body(plain: str, start: int) -> str:
    """Up to the brace that closes it. What a block within declares is its own: it gets a name that is nobody else's."""
    depth, end = 1, start
    while depth:
        brace = _BRACE.search(plain, end)
        if brace is None:
            raise PtxError("a kernel without an end")
        depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
    blocks = itertools.count()
    return _BLOCK.sub(lambda found: _renamed(found[1], next(blocks)), plain[start : end - 1])


def _renamed(block: str, number: int) -> str:
    registers = re.findall(r"\.reg\s+\.\w+\s+(\w+)\s*;", block)
    for name in (*registers, *re.findall(r"^\s*(\w+):", block, re.MULTILINE)):
        block = re.sub(rf"\b{name}\b", f"{'%' if name in registers else '$'}{name}_{number}", block)
    return block


def _statements(body: str, line: int) -> list[tuple[int, str]]:
    """Labels with their colon, and what ends in a semicolon or is a line of its own, with line numbers."""
    found = []
    pending, started = "", line
    for number, text in enumerate(body.split("\n"), line):
        text = text.strip()
        if not pending and re.fullmatch(r"[$\w]+:", text):
            found.append((number, text))
            continue
        if not pending and text.startswith(_SILENT):
            continue
        while text:
            piece, semicolon, text = text.partition(";")
            if not pending:
                started = number
            pending = f"{pending} {piece.strip()}".strip()
            text = text.strip()
            if semicolon:
                found.append((started, pending))
                pending = ""
    if pending:
        raise PtxError(f"line {started}: no end of: {pending}")
    return found


def _declare(statement: str, kinds: dict[str, str]) -> None:
    found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)(?:<(\d+)>)?", statement)
    if found is None or found[1] not in REGISTER_BYTES:
        raise PtxError(f"unknown declaration: {statement}")
    names = [found[2]] if found[3] is None else [f"{found[2]}{i}" for i in range(int(found[3]))]
    kinds.update(dict.fromkeys(names, found[1]))


def _instruction(line: int, statement: str, kinds: dict[str, str]) -> Instruction:
    found = _STATEMENT.fullmatch(statement)
    if found is None:
        raise PtxError(f"line {line}: not an instruction: {statement}")
    negated, guard, opcode, rest = found.groups()
    name, *modifiers = opcode.split(".")
    text = " ".join(statement.split())
    try:
        operands = tuple(_operand(one.strip(), kinds, name == "bra") for one in _OPERAND.findall(rest))
        register = None if guard is None else Register(guard, kinds[guard])
    except (KeyError, ValueError) as error:
        raise PtxError(f"line {line}: {text}: cannot read {error}") from None
    return Instruction(line, text, register, bool(negated), name, tuple(modifiers), operands)


def _operand(text: str, kinds: dict[str, str], branch: bool) -> Operand:
    if branch:
        return Label(text)
    if text.startswith("{"):
        items = tuple(_simple(one.strip(), kinds) for one in text[1:-1].split(","))
        return Vector(items)
    if found := _ELEMENT.match(text):
        corner = Vector(tuple(_simple(one.strip(), kinds) for one in found[2].split(",")))
        return Element(Register(found[1], kinds[found[1]]), corner)
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        register = _simple(base.strip(), kinds)
        if not isinstance(register, (Register, Symbol)):
            raise ValueError(text)
        return Address(register, int(offset.strip(), 0) if offset else 0)
    if "|" in text:  # two results
        return Vector(tuple(_simple(one.strip(), kinds) for one in text.split("|")))
    return _simple(text, kinds)


def _simple(text: str, kinds: dict[str, str]):
    if text in kinds:
        return Register(text, kinds[text])
    if text == "_" or _SPECIAL.match(text):
        return Special(text)
    if found := _FLOAT.match(text):
        return Immediate(int(found[1] or found[2], 16))
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    if re.fullmatch(r"[A-Za-z_$][\w$]*", text):
        return Symbol(text)
    raise ValueError(text)


def _shared(plain: str) -> dict[str, int]:
    """All of our kernels' shared memory is dynamic: one array without a size, which starts where shared memory does."""
    names = re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\];", plain)
    if plain.count(".shared .align") != len(names) or len(names) > 1:
        raise PtxError("shared memory that is not one array of dynamic size")
    return dict.fromkeys(names, 0)
