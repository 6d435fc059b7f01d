"""Imports that follow another package's, on packages made for it, each time in a new process."""

import os
import subprocess
import sys
import textwrap

import pytest

import resnet_fast.utils

# The module that follows is one of our own that takes no time.
START = """
import importlib, importlib.util, inspect, sys, warnings
sys.path.insert(0, "")
from resnet_fast.utils import when_imported as hook
FOLLOWER = "resnet_fast.utils.cpuinfo"
hook._finder.waiting.clear()  # torch and torchvision
hook._finder.follow()
finders = list(sys.meta_path)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "early").mkdir()
    (tmp_path / "early/__init__.py").write_text("import sys\nseen = 'resnet_fast.utils.cpuinfo' in sys.modules\n")
    (tmp_path / "early/inner.py").write_text("value = 3\n")
    (tmp_path / "outer.py").write_text("import sys, early\nseen = 'resnet_fast.utils.cpuinfo' in sys.modules\n")
    (tmp_path / "broken.py").write_text("raise OSError('once')\n")
    root = os.path.dirname(os.path.dirname(resnet_fast.__file__))

    def run(program: str) -> None:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", START + textwrap.dedent(program)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return run


def test_before_and_after(run):
    run("""
        hook.when_imported("early", FOLLOWER)
        assert FOLLOWER not in sys.modules
        import json.tool
        assert FOLLOWER not in sys.modules
        import early.inner
        assert not early.seen and FOLLOWER in sys.modules
        assert sys.meta_path == finders
    """)
    run("""
        import early
        hook.when_imported("early", FOLLOWER)
        assert FOLLOWER in sys.modules and sys.meta_path == finders
    """)


def test_it_waits_for_the_outermost_import(run):
    """A package that imports another one may be half imported when that one is there."""
    run("""
        hook.when_imported("outer", "resnet_fast.utils.files")
        hook.when_imported("early", FOLLOWER)
        import outer
        assert not outer.seen and FOLLOWER in sys.modules and "resnet_fast.utils.files" in sys.modules
        assert sys.meta_path == finders
    """)


def test_the_package_is_as_without_it(run):
    run("""
        hook.when_imported("early", FOLLOWER)
        spec = importlib.util.find_spec("early")
        assert spec.origin.endswith("__init__.py") and spec.submodule_search_locations
        assert spec.loader.get_source("early").startswith("import sys") and spec.loader.is_package("early")
        assert FOLLOWER not in sys.modules
        import early
        assert type(early.__loader__).__name__ == type(early.__spec__.loader).__name__ == "SourceFileLoader"
        assert inspect.getsource(early).startswith("import sys")
        assert importlib.reload(early) is early and early.seen
        importlib.reload(importlib.import_module("early.inner"))
    """)


def test_a_package_that_fails_is_waited_for_again(run):
    run("""
        from pathlib import Path
        hook.when_imported("broken", FOLLOWER)
        hook.when_imported("absent", "resnet_fast.utils.files")
        for name, error in (("broken", OSError), ("absent", ModuleNotFoundError)):
            try:
                importlib.import_module(name)
            except error as said:
                assert str(said) in ("once", "No module named 'absent'")
            else:
                raise AssertionError("imported")
        assert FOLLOWER not in sys.modules
        Path("broken.py").write_text("fine = True  # of another length, for the cache of byte code\\n")
        importlib.invalidate_caches()
        import broken
        assert broken.fine and FOLLOWER in sys.modules and "resnet_fast.utils.files" not in sys.modules
    """)


def test_a_follower_that_fails_is_a_warning(run):
    run("""
        hook.when_imported("early", "resnet_fast.utils.absent")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            import early
        (warning,) = seen
        assert "resnet_fast.utils.absent could not be imported after early" in str(warning.message)
        assert sys.modules["early"] is early and sys.meta_path == finders
    """)


def test_waiting_twice_is_waiting_once(run):
    run("""
        for _ in range(2):
            hook.when_imported("early", FOLLOWER)
        assert len(sys.meta_path) == len(finders) + 1
        import resnet_fast
        importlib.reload(resnet_fast)
        assert len(sys.meta_path) == len(finders) + 1
    """)
