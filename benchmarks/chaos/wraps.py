"""Puts the witness and the fault points into the product's modules as they are imported."""

import hashlib
import importlib.machinery
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.chaos import wraps_export, wraps_storage, wraps_training
from benchmarks.chaos.around import around, passes, replace
from benchmarks.chaos.faults import here, plan, start_anew


def install() -> None:
    """Once in an interpreter, before the product is imported."""
    os.register_at_fork(after_in_child=start_anew)
    sys.meta_path.insert(0, _Finder())
    replace(importlib.metadata, "version", _version)


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _WRAPS and name not in _with_constants():
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        for finder in others:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # get_code and the like, for runpy

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        for constant, value in plan().constants.items():
            where, _, name = constant.rpartition(".")
            if where == module.__name__:
                assert hasattr(module, name), constant
                setattr(module, name, value)
        if module.__name__ in _WRAPS:
            _WRAPS[module.__name__](module)


def _with_constants() -> set[str]:
    return {constant.rpartition(".")[0] for constant in plan().constants}


def _version(original: Callable[[str], str]) -> Callable[[str], str]:
    def version(distribution_name: str) -> str:
        given = plan().versions.get(distribution_name)
        return given if given is not None else original(distribution_name)

    return version


def _wrap_worker(module: ModuleType) -> None:
    def before_init(*_: Any, **__: Any) -> None:
        here.is_worker = True

    around(module.Worker, "__init__", before=before_init)


def _wrap_import_path(module: ModuleType) -> None:
    """Processes of the product start without the folders of PYTHONPATH; these are to have ours."""

    def after_isolate(*_: Any, **__: Any) -> None:
        inside = Path(__file__).parent / "inside"
        os.environ["PYTHONPATH"] = f"{inside}{os.pathsep}{inside.parents[2]}"

    around(module, "isolate", after=after_isolate)


def _wrap_claims(module: ModuleType) -> None:
    """Each stage shares out the cores among its own launches, whatever else this machine does."""

    def of_the_stage(original: Callable[[str], Any]) -> Callable[[str], Any]:
        def claim(what: str) -> Any:
            stage = hashlib.sha256(plan().folder.encode()).hexdigest()[:16]
            return original(f"{stage}-{what}")

        return claim

    replace(module, "_claim", of_the_stage)


def _wrap_spec(module: ModuleType) -> None:
    def before_load(*_: Any, **__: Any) -> None:
        if here.is_worker:
            time.sleep(plan().load_seconds)

    around(module.StudySpec, "load_data", before=before_load)


def _wrap_local(module: ModuleType) -> None:
    around(module.LocalExecutor, "start", after=passes("after start"))


_WRAPS: dict[str, Callable[[ModuleType], None]] = {
    "hpo.claims": _wrap_claims,
    "hpo.executors.local": _wrap_local,
    "hpo.import_path": _wrap_import_path,
    "hpo.spec": _wrap_spec,
    "hpo.worker": _wrap_worker,
    "optuna.trial._trial": wraps_storage.wrap_suggest,
    "storage.checkpoints": wraps_storage.wrap_checkpoints,
    "storage.leases": wraps_storage.wrap_leases,
    "storage.schema": wraps_storage.wrap_schema,
    "storage.studies": wraps_storage.wrap_studies,
    "trainer.device": wraps_training.wrap_device,
    "trainer.export.folder": wraps_export.wrap_export,
    "trainer.loop": wraps_training.wrap_loop,
}
