"""``resnet-fast gpu``: is everything right, repeatable and fast on this machine's GPU?"""

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def gpu(
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where to write the report.")] = Path("runs/gpu"),
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="The GPU, or the CPU to try the suite itself.")
    ] = "cuda",
    minutes: Annotated[
        float, typer.Option(metavar="N", min=0.1, help="Time for all of it; what there is no time for is left out.")
    ] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="Take small cases and models.")] = False,
    part: Annotated[
        Optional[list[str]],
        typer.Option(
            "--part",
            metavar="NAME",
            help="Only numerics, repeats, inference, training, layers, tuned or peers; repeatable.",
        ),
    ] = None,
    json: options.Json = None,
) -> None:
    """Check and measure the kernels on a GPU, for the first time or again: numerics, repeatability, models, layers.

    Every op in every dtype against float64; every op again and again, to the bit; whole models beside eager PyTorch,
    torch.compile and, where installed, TensorRT, in inference and training; every convolution of ResNet-50 and
    ResNet-18 with our kernels and cuDNN's, and the models again as tuned by that; single layers beside eager PyTorch,
    cuDNN and torch.compile. Writes OUT/gpu.html and OUT/gpu.json as it goes on, and exits with 3 if a check fails.
    """
    from resnet_fast.utils.optional import require

    require("jinja2", "the GPU report")
    from resnet_fast.bench.gpu import run, write_report
    from resnet_fast.export import VerificationError
    from resnet_fast.utils.devices import require_gpu

    if device == "cuda":
        require_gpu("--device cuda")
    terminal = console()
    with terminal.status("starting") as status:
        try:
            suite = run(device, minutes, quick, part, status.update, save=lambda suite: write_report(suite, out))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--part") from None
    content = write_report(suite, out)
    write_json(content, json)
    rows = [(one.name, one.status, f"{one.seconds:.0f} s", len(one.results), one.reason) for one in suite.parts]
    terminal.print(table(f"on {content['gpu'].get('name', 'the CPU')}", ("part", "", "took", "results", ""), rows))
    passed = sum(check["passed"] for check in suite.checks)
    verdict = f"{passed} of {len(suite.checks)} checks passed"
    terminal.print(f"{verdict} in {suite.seconds:.0f} s; report: {out / 'gpu.html'}", markup=False)
    if not suite.passed:
        raise VerificationError(f"{verdict}; {out / 'gpu.html'} shows which did not, and which parts are not complete")
