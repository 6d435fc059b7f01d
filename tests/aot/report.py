"""What the kernels compile to: ``python -m tests.aot.report [--subset] [--arch sm_90] [--precision fp16]``.

One row per launch: registers and shared memory per program, spills, tensor-core instructions, 16-byte and other
loads, the main loop's instructions and products. Nothing is run and no GPU is needed. With ``--subset``, few launches
that stand for all (shipped.py).

With ``--record`` the figures are written with which the tests compare (regressions.py), after every architecture and
precision, and the rows are of what changed for the worse; with ``--missing`` only launches without figures are
compiled. Figures that no launch uses any more are dropped.
"""

import argparse
import time

import triton

from tests.aot import regressions
from tests.aot.checks import Compiler, Result
from tests.aot.layers import ARCHITECTURES, PRECISIONS, Item
from tests.aot.shipped import TARGETS, Target, everything, subset

_HEADER = (
    f"{'arch':7} {'regs':>4} {'smem':>6} {'spill':>5} {'local':>5} {'mma':>4} {'16B':>4} {'other':>5} {'instr':>5} "
    f"{'loop':>9}  launch"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subset", action="store_true", help="only launches that stand for all")
    parser.add_argument("--record", action="store_true", help="write the figures that the tests compare with")
    parser.add_argument("--missing", action="store_true", help="with --record: only of launches that have none")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    options = parser.parse_args()
    targets = [
        target
        for target in TARGETS
        if target[0] in (options.arch or ARCHITECTURES) and target[1] in (options.precision or PRECISIONS)
    ]

    started, count = time.perf_counter(), 0
    with Compiler() as compiler:
        if not options.record:
            print(_HEADER, flush=True)
        for target in targets:
            chosen = subset()[target] if options.subset else everything(target)
            if options.record:
                count += _record(compiler, target, chosen, options.missing)
                continue
            compiler.start(chosen)
            for one in chosen:
                print(_row(*compiler.results([one])), flush=True)
                count += 1
    print(f"{count} binaries in {time.perf_counter() - started:.0f} s")


def _record(compiler: Compiler, target: Target, chosen: list[Item], missing: bool) -> int:
    """How many were compiled."""
    architecture = target[0]
    same_triton = regressions.recorded_with(architecture) == triton.__version__
    before = regressions.recorded(architecture) if same_triton else {}
    shipped = {one.entry() for other in TARGETS if other[0] == architecture for one in everything(other)}
    results = compiler.results(one for one in chosen if not missing or one.entry() not in before)
    kept = {name: figures for name, figures in before.items() if name in shipped}
    new = {one.entry(): regressions.figures(made) for one, made in results if made is not None}
    print(f"{'-'.join(target)}: {len(results)} compiled, {len(before) - len(kept)} no longer launched", flush=True)
    for one, made in results:
        if made is None:
            print(f"  the compiler crashed: {one.entry()}", flush=True)
        elif one.entry() in before:
            for worse in regressions.compare(before[one.entry()], made, architecture):
                print(f"  worse: {one.entry()}: {worse}", flush=True)
    regressions.save(architecture, {**kept, **new})
    return len(results)


def _row(result: Result) -> str:
    one, made = result
    if made is None:
        return f"{one.architecture:7} the compiler crashed  {one.entry()}  {one.name}"
    return (
        f"{one.architecture:7} {made.registers:4} {made.shared:6} {made.spilled:5} {made.local_accesses:5} "
        f"{made.tensor_core:4} {made.wide_loads:4} {made.narrow_loads:5} {made.instructions:5} "
        f"{f'{made.loop.instructions}/{made.loop.products}':>9}  {one.entry()}  {one.name}"
    )


if __name__ == "__main__":
    main()
