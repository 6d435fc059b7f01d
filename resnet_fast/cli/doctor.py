"""``resnet-fast doctor``: what this machine has, and which implementation serves which op on it."""

from typing import Any, Optional

from resnet_fast.cli import options
from resnet_fast.cli.console import console, table, write_json


def doctor(json: options.Json = None) -> None:
    """Show versions and devices, which implementation serves which op here, and why the others do not."""
    from resnet_fast.bench.machine import describe

    machine = describe()
    devices = _devices()
    native = _native()
    services = _services([device for device, reason in devices.items() if reason is None])
    out = console()
    rows = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in machine.items()]
    packages = machine["packages"]
    rows = [row for row in rows if row[0] != "packages"]
    rows += [(f"device {name}", reason or "available") for name, reason in devices.items()]
    rows.append(("compiled kernels", _compiled(native)))
    out.print(table("machine", ("", ""), rows))
    out.print(table("packages", ("", ""), [(name, _package(name, found)) for name, found in packages.items()]))
    dtypes = list(dict.fromkeys(service["dtype"] for service in services))
    served = {(service["case"], service["device"], service["dtype"]): service["served_by"] for service in services}
    places = list(dict.fromkeys((service["case"], service["device"]) for service in services))
    lines = [(*place, *(served[(*place, dtype)] for dtype in dtypes)) for place in places]
    out.print(table("implementations", ("op", "device", *dtypes), lines))
    refusals = [(name, reason) for service in services for name, reason in service["others"].items() if reason]
    out.print(table("why not", ("", ""), list(dict.fromkeys(refusals))))
    write_json({"machine": machine, "devices": devices, "native": native, "implementations": services}, json)


def _package(name: str, version: Optional[str]) -> str:
    from resnet_fast.bench import peer_environment
    from resnet_fast.utils.optional import EXTRAS

    module = {"scikit-learn": "sklearn", "scikit-image": "skimage"}.get(name, name)
    if version is not None:
        return version
    if name in peer_environment.PACKAGES:
        return (peer_environment.missing(name) or "").removeprefix(f"{name} is ")
    return f"not installed: pip install 'resnet-fast[{EXTRAS[module]}]'" if module in EXTRAS else "not installed"


def _devices() -> dict[str, Optional[str]]:
    """Device types that the kernels are written for: None where there is one, else the reason why not."""
    from resnet_fast.utils.devices import gpu_missing

    return {"cpu": None, "cuda": gpu_missing()}


def _native() -> dict[str, Any]:
    """Whether the compiled kernels are there, the instruction set in use, and those that this CPU runs."""
    from resnet_fast.kernels.native import library

    reason = library.unavailable()
    if reason is not None:
        return {"unavailable": reason, "variant": None, "usable_variants": []}
    return {"unavailable": None, "variant": library.variant(), "usable_variants": library.usable_variants()}


def _compiled(native: dict[str, Any]) -> str:
    if native["unavailable"] is not None:
        return native["unavailable"]
    others = [name for name in native["usable_variants"] if name != native["variant"]]
    return f"{native['variant']} in use" + (f"; this CPU also runs {', '.join(others)}" if others else "")


def _services(devices: list[str]) -> list[dict[str, Any]]:
    import torch

    from resnet_fast import ops
    from resnet_fast.kernels.contract import Case

    geometries: list[tuple[str, str, tuple]] = [
        ("conv 1x1", "conv_bn_act", (256, 64)),
        ("conv 3x3", "conv_bn_act", (64, 64, (3, 3), (1, 1), (1, 1))),
        ("conv 3x3, dilation 2", "conv_bn_act", (64, 64, (3, 3), (1, 1), (2, 2), (2, 2))),
        ("conv 3x3, groups 32", "conv_bn_act", (128, 128, (3, 3), (1, 1), (1, 1), (1, 1), 32)),
        ("stem 7x7", "stem", (3, 64, (7, 7), (2, 2), (3, 3))),
        ("global average pool", "global_avg_pool", (512, 512)),
    ]
    services = []
    for device in devices:
        for title, op, geometry in geometries:
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                case = Case(op, device, dtype, *geometry)
                server = ops.implementation_for(case)
                services.append(
                    {
                        "case": title,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "served_by": server,
                        "others": {
                            name: implementation.supports(case)
                            for name, implementation in ops.IMPLEMENTATIONS.items()
                            if name != server
                        },
                    }
                )
    return services
