"""How a kernel of convolution or product is cut into programs."""

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """One program makes [rows, columns] of the output, ``reduction`` elements of the inner dimension at a time.

    kernel: "pointers", or another way to the same result, where there is one (forward.py). parts: of the inner
    dimension, each made by programs of its own and summed afterwards.
    """

    rows: int
    columns: int
    reduction: int
    warps: int
    stages: int
    split: bool
    kernel: str = "pointers"
    parts: int = 1

    def constants(self, split: bool = True) -> dict[str, Any]:
        """For a kernel; split: one that can finish a tile in two halves."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "BK": self.reduction,
            **({"SPLIT": self.split} if split else {}),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
