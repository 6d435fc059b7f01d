"""``resnet-fast explain``: what is fused in a model, what serves it, and why the rest is not."""

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def explain(
    model: options.Model,
    num_classes: options.Classes = None,
    json: options.Json = None,
    debug: options.Debug = False,
) -> None:
    """Show which blocks of a model run fused, what serves each step, and why the rest does not."""
    from resnet_fast import accelerate
    from resnet_fast import explain as explanation_of
    from resnet_fast.cli.models import build

    explanation = explanation_of(accelerate(build(model, num_classes=num_classes)))
    rows = [
        (row.path or "(model)", row.kind, row.status, "\n".join([*row.steps, *([row.reason] if row.reason else [])]))
        for row in explanation.rows
    ]
    out = console()
    out.print(table(model, ("module", "class", "status", "fused steps and what serves them; what is not fused"), rows))
    fused = sum(row.status == "fused" for row in explanation.rows)
    partly = sum(row.status == "partly fused" for row in explanation.rows)
    out.print(f"{fused} modules fused, {partly} partly, {len(rows) - fused - partly} as they were.")
    write_json({"model": model, **explanation.as_dict()}, json)
