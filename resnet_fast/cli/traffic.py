"""``resnet-fast traffic``: the bytes that a forward pass in training moves, stock and fused."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json
from resnet_fast.utils.names import Dtype

if TYPE_CHECKING:
    from resnet_fast.bench.ledger import Move


def traffic(
    model: options.Model,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a training step.")] = 128,
    size: options.Size = 224,
    dtype: Annotated[Dtype, typer.Option(help="The type of images and weights.")] = "float16",
    frozen_bn: options.FrozenBatchNorm = False,
    json: options.Json = None,
) -> None:
    """Count the bytes that a model's forward pass in training moves, stock and accelerated, without running it.

    Each operation reads its operands once and writes its results once, a convolution reads the pixels that it needs,
    batch norm by batch statistics reads twice. What kernels keep in workspaces is not counted.
    """
    import torch

    from resnet_fast.bench.norms import norms_of
    from resnet_fast.bench.traffic import blocks, compare
    from resnet_fast.export.metadata import channels_of

    stock = options.build(model).train()
    for norm in norms_of(stock):
        norm.train(not frozen_bn)
    moves = compare(stock, (batch, channels_of(stock) or 3, size, size), getattr(torch, dtype))
    by_block = {name: blocks(found) for name, found in moves.items()}
    total = {name: sum(found.values()) for name, found in by_block.items()}
    rows = [(block, by_block["stock"][block], by_block["ours"][block]) for block in by_block["stock"]]
    rows.append(("all blocks", total["stock"], total["ours"]))
    columns: tuple[str, ...] = ("stock GB", "ours GB", "of stock")
    title = f"{model}, forward in training, batch {batch}, {size}x{size}, {dtype}: images read and written, by block"
    cells = [(block, *_gigabytes(theirs, ours), f"{ours / theirs:.1%}") for block, theirs, ours in rows]
    out = console()
    out.print(table(title, ("", *columns), cells, columns))
    for name, found in moves.items():
        columns = ("calls", "read GB", "written GB", "other GB")
        out.print(table(f"{name}, all blocks by operation", ("", *columns), _by_operation(found), columns))
    setting: dict[str, Any] = {"model": model, "batch": batch, "size": size, "dtype": dtype, "frozen_bn": frozen_bn}
    for name, found in moves.items():
        setting[name] = {"total": total[name], "blocks": by_block[name], "moves": [_as_dict(move) for move in found]}
    write_json(setting, json)


def _as_dict(move: "Move") -> dict[str, Any]:
    return {name: getattr(move, name) for name in ("block", "op", "read", "written", "other")}


def _by_operation(moves: "list[Move]") -> list[tuple[Any, ...]]:
    """What moves images in the blocks: operation, calls, and bytes read, written and other; most bytes first."""
    calls, read, written, other = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for move in moves:
        if move.block and move.images:
            calls[move.op] += 1
            read[move.op] += move.read
            written[move.op] += move.written
            other[move.op] += move.other
    ops = sorted(calls, key=lambda op: -read[op] - written[op])
    return [(op, calls[op], *_gigabytes(read[op], written[op], other[op])) for op in ops]


def _gigabytes(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size / 1e9:.3f}" for size in sizes)
