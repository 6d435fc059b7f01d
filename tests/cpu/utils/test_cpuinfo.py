"""The number of processors, as systems of different kinds tell it."""

import os

from resnet_fast.utils.cpuinfo import available_cores


def test_cores(monkeypatch):
    """Those that this process may use, on Linux; all, where no process is kept to some."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1
