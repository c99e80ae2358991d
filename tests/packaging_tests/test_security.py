"""What no line of the packages may do."""

import ast
import re

import pytest

from tests.packaging_tests.project import imported, sources

FORBIDDEN_IMPORTS = {
    "pickle": "runs code from a file",
    "cPickle": "runs code from a file",
    "_pickle": "runs code from a file",
    "cloudpickle": "runs code from a file",
    "dill": "runs code from a file",
    "joblib": "unpickles what it loads",
    "marshal": "runs code from a file",
    "shelve": "unpickles what it loads",
}
FORBIDDEN_NAMES = {
    "CmaEsSampler": "unpickles what it finds in the database",
    "JournalRedisStorage": "unpickles what it finds in the database",
    "JournalRedisBackend": "unpickles what it finds in the database",
    "allow_pickle": "numpy's way to unpickle",
    "add_safe_globals": "widens what torch.load trusts",
}
SOURCES = list(sources())


def calls(tree: ast.Module, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func) == name]


@pytest.mark.parametrize(("file", "tree"), SOURCES, ids=[file for file, _ in SOURCES])
def test_no_file_unpickles(file: str, tree: ast.Module) -> None:
    for module in imported(tree):
        reason = FORBIDDEN_IMPORTS.get(module.partition(".")[0])
        assert reason is None, f"{file} imports {module}: {reason}"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            name = node.arg
        else:
            name = getattr(node, "attr", None) or getattr(node, "id", None)
        reason = FORBIDDEN_NAMES.get(name or "")
        assert reason is None, f"{file} names {name}: {reason}"


@pytest.mark.parametrize(("file", "tree"), SOURCES, ids=[file for file, _ in SOURCES])
def test_torch_loads_weights_only(file: str, tree: ast.Module) -> None:
    assert "torch.load" not in imported(tree), f"{file}: say torch.load, so that this test sees it"
    for call in calls(tree, "torch.load"):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("weights_only") == "True", f"{file}:{call.lineno}: bare torch.load"


@pytest.mark.parametrize(("file", "tree"), SOURCES, ids=[file for file, _ in SOURCES])
def test_no_file_names_an_address_without_https(file: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = re.search(r"\b(http|ftp)://[a-z0-9]", node.value)
            assert found is None, f"{file}:{node.lineno}"
