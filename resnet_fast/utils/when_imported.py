"""Imports of our own that follow the import of another package, whoever asks for that one and when.

A finder in front of ``sys.meta_path`` lets the others find the packages that are waited for, and our own modules, and
counts how deep their imports lie in each other. What follows is imported when the outermost has ended: before that, a
module of ours that has imported torch may itself be half imported.
"""

import importlib
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Optional

_OURS = __name__.partition(".")[0] + "."


def when_imported(package: str, module: str) -> None:
    """Import ``module`` now if ``package`` has been imported, else as soon as it has been.

    A ``module`` that cannot be imported then is reported by a warning, for ``package`` itself is all right.
    """
    if sys.modules.get(package) is not None:
        importlib.import_module(module)
        return
    _finder.waiting[package] = module
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if name not in self.waiting and not name.startswith(_OURS):
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :]:  # those in front have been asked
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def follow(self) -> None:
        """Import what waits for packages that are there now."""
        while ready := [package for package in self.waiting if sys.modules.get(package) is not None]:
            package, module = ready[0], self.waiting.pop(ready[0])
            try:
                importlib.import_module(module)
            except Exception as error:
                warnings.warn(f"{module} could not be imported after {package}: {error!r}", RuntimeWarning, 2)
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Another loader, which has its place in the module again before the module runs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        _under_way.imports += 1
        try:
            self._loader.exec_module(module)
        finally:
            _under_way.imports -= 1
        if not _under_way.imports:
            _finder.follow()


class _UnderWay(threading.local):
    imports = 0


_finder, _under_way = _Finder(), _UnderWay()
