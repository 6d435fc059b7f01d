"""What the kernels compile to: ``python -m tests.aot.report [--all] [--arch sm_90] [--precision fp16]``.

One row per launch: registers and shared memory per program, spills, tensor-core instructions, 16-byte and other
loads. Nothing is run and no GPU is needed. Without ``--all``, one row per kind of binary (see layers.py).
"""

import argparse
import time

from tests.aot.layers import ARCHITECTURES, PRECISIONS, distinct, launches, representative
from tests.aot.offline import CompilerCrash, Worker

_HEADER = (
    f"{'arch':7} {'precision':9} {'kernel':20} {'tile':12} {'warps':>5} {'stages':>6} {'regs':>4} {'smem':>6} "
    f"{'spill':>5} {'local':>5} {'mma':>4} {'16B':>4} {'other':>5} {'instr':>5}  layer"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every binary, not one of each kind")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    options = parser.parse_args()
    choose = distinct if options.all else representative

    print(_HEADER, flush=True)
    started, count = time.perf_counter(), 0
    with Worker() as worker:
        for architecture in options.arch or ARCHITECTURES:
            for precision in options.precision or PRECISIONS:
                for one in choose(launches(architecture, precision)):
                    count += 1
                    constants = one.plan.constants
                    tile = "x".join(str(constants[name]) for name in ("BM", "BN", "BK") if name in constants)
                    what = f"{architecture:7} {precision:9} {one.plan.kernel.__name__:20} {tile:12} "
                    try:
                        made = worker.compile(one.plan, architecture)
                    except CompilerCrash as crash:
                        print(f"{what} {crash}  {one.name}", flush=True)
                        continue
                    print(
                        f"{what}{made.warps:5} {constants.get('num_stages', 0):6} {made.registers:4} {made.shared:6} "
                        f"{made.spilled:5} {made.local_accesses:5} {made.tensor_core:4} {made.wide_loads:4} "
                        f"{made.narrow_loads:5} {made.instructions:5}  {one.name}",
                        flush=True,
                    )
    print(f"{count} binaries in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
