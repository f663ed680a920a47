"""The wheel and the sdist hold the whole package, kernels/ and csrc/ included, and import elsewhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("crossan_fast", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TESTED = (".manifest.in", "constraints.txt", "tests", "benchmarks", "docs", ".ci")


def run(*command: str, cwd: Path, **options) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path, what: str) -> Path:
    hook = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    return out / run(sys.executable, "-c", hook, cwd=source).splitlines()[-1]


def expected() -> set[str]:
    """Every file of the three source folders, by its place in the package."""
    found = set()
    for folder, package in (("crossan_fast", ""), ("kernels", "kernels/"), ("csrc", "csrc/")):
        for path in (ROOT / folder).rglob("*"):
            hidden = any(part.startswith((".", "__pycache__")) for part in path.parts[len(ROOT.parts) :])
            if path.is_file() and not hidden and path.suffix not in {".pyc", ".md", ".so", ".o"}:
                found.add(f"crossan_fast/{package}{path.relative_to(ROOT / folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """One built from the tree, one from the sdist that was built from the tree."""
    base = tmp_path_factory.mktemp("packaging")
    tree = base / "tree"
    tree.mkdir()
    for part in (*PARTS, *TESTED):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, tree / part)
    sdist = build(tree, base, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "unpacked", filter="data")
    (unpacked,) = (base / "unpacked").iterdir()
    (base / "again").mkdir()
    for part in TESTED:
        found = {path.relative_to(tree) for path in tree.glob(f"{part}/**/*") if path.is_file()}
        assert (unpacked / part).exists() and all((unpacked / path).is_file() for path in found), part
    # Tests of the unpacked tree, by its own settings and on its own package.
    wanted = ("tests/test_config.py", "tests/training/test_batches.py")
    run(sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *wanted, cwd=unpacked)
    return {"tree": build(tree, base, "wheel"), "sdist": build(unpacked, base / "again", "wheel")}


@pytest.mark.parametrize("origin", ["tree", "sdist"])
def test_wheel_holds_every_source_file(wheels, origin):
    with zipfile.ZipFile(wheels[origin]) as wheel:
        inside = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert inside == expected()


def test_wheel_imports_away_from_the_tree(wheels, tmp_path):
    with zipfile.ZipFile(wheels["tree"]) as wheel:
        wheel.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, 'site');"
        "import crossan_fast, crossan_fast.kernels, crossan_fast.csrc;"
        "print(crossan_fast.__file__); print(sorted(m for m in sys.modules if m == 'transformers'))"
    )
    out = run(sys.executable, "-I", "-c", script, cwd=tmp_path).splitlines()
    assert (tmp_path / out[0]).is_relative_to(tmp_path / "site")
    assert out[1] == "[]"  # importing the package needs no transformers


def test_every_dependency_is_imported() -> None:
    """By the package itself; `tomllib` is younger than the oldest Python, so the list is cut out by hand."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    names = re.findall(r'^  "([a-z0-9-]+)', listed[1], re.MULTILINE)
    assert len(names) == listed[1].count("\n")
    imported = set()
    for path in [*(ROOT / "crossan_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    assert not [name for name in names if {"pyyaml": "yaml"}.get(name, name) not in imported]
