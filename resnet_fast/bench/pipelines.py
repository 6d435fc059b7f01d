"""The kernels that operations become: one each in eager PyTorch, fewer in a compiler's pipeline, and ours.

Nothing here was measured or compiled. What a kernel reads from memory and writes there, and in how many launches, is
derived from the operations that ``traffic.py`` counts.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from resnet_fast.bench.ledger import Move, Value

MOST_CHANNELS = 256
"""Back to back, a program keeps all output channels of the second convolution for its rows: that many, at most."""

_TILE_ROWS, _COMBINED = 128, 128  # of a convolution's tile, whose statistics are combined so many tiles at a time
_STEM_CHANNELS = 8  # with so few, images are padded first: zeros, and a copy
_SUMMED = ("gram", "wgrad", "tail_backward")  # a second launch sums what the programs of the first left
_GATED = ("dgrad", "dgrad_expand")  # so it does here, where the gradient goes through a ReLU and batch norm
_REDUCTIONS = ("mean", "sum", "native_batch_norm", "native_batch_norm_backward")


@dataclass(frozen=True)
class Kernel:
    """A move, and how many launches it takes."""

    move: Move
    launches: int


# --- eager ------------------------------------------------------------------------------------------------------------


def eager(moves: Iterable[Move]) -> list[Kernel]:
    """A kernel for every operation; two where batch norm needs sums over the images first."""
    return [Kernel(move, 1 + _needs_sums(move)) for move in moves]


def _needs_sums(move: Move) -> bool:
    """Return whether it is a batch norm with batch statistics, which reads its images twice, forward or backward."""
    images = [value.id for value in move.reads if value.image]
    return move.op.startswith("native_batch_norm") and len(images) > len(set(images))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(moves: list[Move]) -> list[Kernel]:
    """A pipeline like ``torch.compile``'s: cuDNN's convolutions, and pointwise operations fused between them.

    A pointwise operation is computed by the kernel that first needs its result: a pass of its own in front of a
    convolution or pooling, or the sums of a batch norm. That kernel computes all pointwise operations on the way
    there, and writes what others read again. So batch norm, addition and ReLU are one pass (in training after one for
    the statistics), and every element is computed once.
    """
    return _Fusion(moves).run()


class _Fusion:
    def __init__(self, moves: list[Move]) -> None:
        self._moves = [part for move in moves for part in _parts(move)]
        self._unread = Counter(value.id for move in self._moves for value in set(move.reads))
        self._waiting: dict[int, Move] = {}  # pointwise operations, by what they would write
        self._kernels: list[Kernel] = []

    def run(self) -> list[Kernel]:
        for move in self._moves:
            if move.pointwise:
                self._waiting |= {value.id: move for value in move.writes}
                continue
            if move.op not in _REDUCTIONS:
                for value in move.reads:
                    if value.id in self._waiting:
                        self._launch(self._waiting[value.id])
            self._launch(move)
        for move in list(self._waiting.values())[::-1]:  # results: the last ones compute others on the way
            if any(value.id in self._waiting for value in move.writes):
                self._launch(move)
        return self._kernels

    def _launch(self, last: Move) -> None:
        """A kernel that ends in ``last``, and computes what waits for that."""
        fused = self._take(last)
        made = {value.id: value for move in fused for value in move.writes}
        reads: dict[int, Value] = {}
        for move in fused:
            for value in set(move.reads):
                self._unread[value.id] -= 1
                if value.id not in made:
                    reads[value.id] = max(value, reads.get(value.id, value), key=lambda read: read.size)
        results = {value.id for value in last.writes}
        writes = [value for value in made.values() if value.id in results or self._unread[value.id] > 0]
        op = "+".join(move.op for move in fused)
        place = last.place if last.block else fused[0].place  # a head's pooling ends a block's kernel
        move = replace(last, place=place, op=op, reads=tuple(reads.values()), writes=tuple(writes))
        if move.bytes:
            self._kernels.append(Kernel(move, 1))

    def _take(self, last: Move) -> list[Move]:
        """Take what waits for ``last``, in order, and ``last`` itself; it waits no more."""
        for value in last.writes:
            self._waiting.pop(value.id, None)
        fused: list[Move] = []
        for value in last.reads:
            if value.id in self._waiting:
                fused += self._take(self._waiting[value.id])
        return [*fused, last]


def _parts(move: Move) -> list[Move]:
    """Batch norm's sums, and its pointwise part."""
    if not move.op.startswith("native_batch_norm"):
        return [move]
    if not _needs_sums(move):
        return [replace(move, pointwise=True)]
    reads = tuple(dict.fromkeys(move.reads))
    images = tuple(value for value in move.writes if value.image)
    vectors = tuple(value for value in move.writes if not value.image)
    sums = replace(move, reads=reads, writes=vectors)
    return [sums, replace(move, reads=(*reads, *vectors), writes=images, pointwise=True)]


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(moves: list[Move]) -> list[Kernel]:
    """The kernels behind our ops on a GPU (``kernels/triton/``): launches at most, as small sums need no second one.

    Workspaces are not counted, but for the stem, of which one kernel writes the convolution's result for another. Nor
    is the packing of weights, once in inference and after every step in training.
    """
    return [kernel for move in moves for kernel in _kernels(move)]


def _kernels(move: Move) -> list[Kernel]:
    if move.op == "stem":
        return _stem(move)
    launches = 1 + (move.op in _SUMMED or _needs_sums(move))
    if move.op in _GATED:
        launches += any(not value.image and len(value.shape) == 1 for value in move.writes)
    elif move.op == "conv_statistics":
        launches += _combinations(move.writes[0])
    elif move.op == "tail_pool_backward":
        launches += 2
    elif move.op == "head":
        launches += 1  # the pool and the product, but for few images
    if move.op in ("conv_bn_act", "conv_statistics", "conv_affine", "wgrad"):
        launches += 2 * _padded(move)
    return [Kernel(move, launches)]


def _stem(move: Move) -> list[Kernel]:
    """Convolution, and max-pool."""
    x, *_ = move.reads
    (out,) = move.writes
    n, k, *_ = out.shape
    p, q = ((size - 1) // 2 + 1 for size in x.shape[2:])
    size = out.size // math.prod(out.shape) * n * k * p * q
    convolved = Value(-1 - out.id, (n, k, p, q), size, True)
    return [
        Kernel(replace(move, op="stem convolution", writes=(convolved,)), 1 + 2 * _padded(move)),
        Kernel(replace(move, op="stem max-pool", reads=(convolved,), flops=0), 1),
    ]


def _padded(move: Move) -> bool:
    images = [value for value in move.reads if value.image and value.shape[1] <= _STEM_CHANNELS]
    kernels = [value for value in (*move.reads, *move.writes) if not value.image and len(value.shape) == 4]
    return bool(images and kernels) and kernels[0].shape[3] > 1


def _combinations(y: Value) -> int:
    """Rounds in which the statistics of a convolution's tiles become one."""
    n, _, p, q = y.shape
    tiles, rounds = -(-n * p * q // _TILE_ROWS), 0
    while rounds == 0 or tiles > 1:
        tiles, rounds = -(-tiles // _COMBINED), rounds + 1
    return rounds


def back_to_back(moves: list[Move]) -> list[Move]:
    """Inference with a block's end fused with the next block's begin, where both are 1x1 convolutions.

    The kernel of convolution, batch norm, addition and ReLU also multiplies its tile by the next weight, so that the
    next convolution does not read the block's result. For blocks whose shortcut is the identity; see MOST_CHANNELS.
    """
    makers = {value.id: move for move in moves for value in move.writes}
    readers = Counter(move.reads[0].id for move in moves if move.op == "conv_bn_act")
    result = []
    for move in moves:
        maker = makers.get(move.reads[0].id) if move.reads else None
        if maker is not None and readers[move.reads[0].id] == 1 and _ends_a_block(maker) and _follows(move):
            move = replace(move, op="conv_bn_act back to back", reads=move.reads[1:])
        result.append(move)
    return result


def _ends_a_block(move: Move) -> bool:
    residual = [value for value in move.reads[1:] if value.image]
    return _pointwise_convolution(move) and bool(residual)


def _follows(move: Move) -> bool:
    residual = [value for value in move.reads[1:] if value.image]
    return _pointwise_convolution(move) and not residual and move.writes[0].shape[1] <= MOST_CHANNELS


def _pointwise_convolution(move: Move) -> bool:
    if move.op != "conv_bn_act":
        return False
    x, weight, *_ = move.reads
    return weight.shape == (weight.shape[0], x.shape[1], 1, 1) and x.shape[2:] == move.writes[0].shape[2:]
