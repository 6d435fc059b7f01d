"""What the system says about the processors."""

import os
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may run on; where the system does not say, all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_processor() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; nothing on other systems than Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
