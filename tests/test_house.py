"""The house rules that a program can hold: how long files and functions are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES, FUNCTION_LINES = 450, 60
SOURCES = [
    path
    for folder in ("crossan_fast", "kernels", "benchmarks", "csrc")
    for kind in ("*.py", "*.cpp", "*.cu", "*.h", "*.cuh")
    for path in sorted((ROOT / folder).rglob(kind))
    if "_libraries" not in path.parts
]


def long_functions(tree: ast.AST) -> Iterator[str]:
    """Functions over the limit, docstring included; what Triton compiles may be longer."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            compiled = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if lines > FUNCTION_LINES and not compiled:
                yield f"{node.name}: {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    if path.suffix == ".py":
        assert not list(long_functions(ast.parse(text)))


def test_the_files_that_the_contributors_page_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:crossan_fast|kernels|csrc|tests|benchmarks|docs)/[\w/.]+)`", text)
    assert len(named) > 25
    assert not [path for path in named if not (ROOT / path).exists()]


CSRC = ROOT / "csrc"
# The CPU's kernels: numbers alone, from pointers.
PLAIN = [
    *("gemm.cpp", "streaming_softmax.cpp", "fusion/kernels.cpp"),
    *(f"sequence_encoder/{name}.cpp" for name in ("forward", "backward")),
    *(f"side_network/{name}.cpp" for name in ("forward", "backward", "coupled_forward", "coupled_backward")),
]
BORDERS = {"border.h", "library.h", "ranking_border.h", "streaming_loss.h"}


def included(path: Path, seen: set[Path]) -> Iterator[str]:
    """What a file of csrc/cpu includes from elsewhere, through the headers of csrc."""
    seen.add(path)
    for kind, name in re.findall(
        r'^#include ([<"])([\w/.]+)', path.read_text(encoding="utf-8"), re.MULTILINE
    ):
        here = [folder / name for folder in (path.parent, CSRC / "cpu", CSRC) if (folder / name).exists()]
        if kind == "<" or not here:
            yield name
        elif here[0] not in seen:
            yield from included(here[0], seen)


def test_the_cpus_kernels_need_no_header_of_torch() -> None:
    headers = [path for path in (CSRC / "cpu").rglob("*.h") if path.name not in BORDERS]
    assert len(headers) > 20
    for path in [*(CSRC / "cpu" / name for name in PLAIN), *headers]:
        assert not [name for name in included(path, set()) if name.startswith(("ATen/", "c10/", "torch/"))], (
            path
        )
    assert "ATen/core/Tensor.h" in list(included(CSRC / "cpu" / "side_network" / "border.cpp", set()))


def test_a_long_function_is_found_and_a_kernel_is_not() -> None:
    long = "def work():\n" + "    pass\n" * FUNCTION_LINES
    assert list(long_functions(ast.parse(long))) == [f"work: {FUNCTION_LINES + 1} lines"]
    assert not list(long_functions(ast.parse("@triton.jit\n" + long)))
