"""What the examples share: real data, and a check that blocks were trained by the fused ops and that the loss fell."""

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from resnet_fast.finetune.digits import digits


def steps_wanted(default: int) -> int:
    """The command line's ``--steps``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=default)
    return parser.parse_args().steps


def batches(count: int, size: int = 16) -> DataLoader:
    """Handwritten digits: images ``[N, 3, 32, 32]``, labels ``[N]``."""
    data = digits(seed=0)
    wanted = slice(count * size)
    return DataLoader(TensorDataset(data.train_images[wanted], data.train_labels[wanted]), size)


class _Calls(TorchDispatchMode):
    """Counts the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watch() -> Iterator[list[float]]:
    """Takes the loss of every step inside.

    Raises:
        SystemExit: no residual block ran fused, forward and backward, or the loss did not fall.
    """
    losses: list[float] = []
    with _Calls() as calls:
        yield losses
    forward, backward = (calls.counts[f"resnet_fast::residual_block{part}"] for part in ("", "_backward"))
    part = max(1, len(losses) // 3)
    before, after = sum(losses[:part]) / part, sum(losses[-part:]) / part
    print(f"loss {before:.3f} -> {after:.3f}; blocks that ran fused: {forward} forward, {backward} backward")
    if not forward or not backward:
        raise SystemExit("no block was trained by the fused ops")
    if not after < before:
        raise SystemExit("the loss did not fall")
