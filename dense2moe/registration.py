"""Our own mixtures, known to transformers once dense2moe is imported.

Whichever of the two is imported first, and without importing the other: a model type of ours is looked up when a config
names it. So `AutoModel...from_pretrained` loads such a checkpoint by the classes of this package, and no code of the
checkpoint is run.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.configuration_auto"


class _OwnConfigs(dict[str, Any]):
    """Registered configs, and ours, made when asked for."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or _is_own(name)

    def __getitem__(self, name: str) -> Any:
        if not super().__contains__(name) and _is_own(name):
            from dense2moe.upcycle.checkpoints.mixture_classes import register_mixture

            register_mixture(name)
        return super().__getitem__(name)


def _is_own(name: object) -> bool:
    if not isinstance(name, str) or not name.startswith("mixture_"):
        return False
    from dense2moe.upcycle.models.table import find_host

    return find_host(name) is not None


def _extend(module: Any) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _OwnConfigs(mapping._extra_content)


class _Watcher(importlib.abc.MetaPathFinder):
    """Extends transformers' table of configs as soon as it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec; its loader calls `_extend` at the end.

        None for all other modules.
        """
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_extend(module: ModuleType) -> None:
            run(module)
            _extend(module)

        spec.loader.exec_module = run_and_extend  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Make our mixtures known to transformers, now or when it is imported."""
    if _MODULE in sys.modules:
        _extend(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Watcher())
