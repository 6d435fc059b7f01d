"""What Linux says about the processor."""

from pathlib import Path


def first_processor() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; nothing on other systems than Linux."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
