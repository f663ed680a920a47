"""Loading runs no code: the package's own source is searched for what would."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "crossan_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
BUILTINS = {"eval", "exec", "__import__"}
# `module.name` calls, but those that are `_restricted`.
CALLS = {("torch", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("yaml", "load")}
FLAGS = {"allow_pickle", "trust_remote_code"}


def _restricted(name: tuple[str, str], call: ast.Call) -> bool:
    """yaml.load by the loader of _untrusted.py, a SafeLoader; torch.load of tensors alone."""
    if name == ("torch", "load"):
        return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
    return name == ("yaml", "load") and [ast.unparse(a) for a in call.args[1:]] == ["_Loader"]


def faults(tree: ast.AST) -> list[str]:
    """What in a module could run code of a file that it loads."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in BUILTINS:
                found.append(function.id)
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                name = (function.value.id, function.attr)
                if name in CALLS and not _restricted(name, node):
                    found.append(".".join(name))
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FLAGS and not off:
                    found.append(str(keyword.arg))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_loaded_can_run(path: Path) -> None:
    assert not faults(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=trusted)",
        "eval(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=asked)",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert faults(ast.parse(line))
    assert not faults(ast.parse("model.eval(); np.load(path, allow_pickle=False)"))
