"""README's Python under `mypy --strict`, and what a call of the model is to a type checker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What README's reader has in a loop of their own.
AT_HAND = """\
import torch

item_ids: torch.Tensor
states: dict[str, torch.Tensor]
train_counts: torch.Tensor
"""

CALLS = """
from typing_extensions import assert_type

from crossan_fast.output import CrossanOutput

assert_type(model(item_ids, states=states), CrossanOutput)
assert_type(out.user_embeddings, torch.Tensor)
model(item_ids, state=states)
"""


@pytest.mark.long  # mypy reads torch
def test_readme_passes_mypy_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    monkeypatch.chdir(ROOT)
    options = ["--strict", "--follow-imports=silent", "--config-file="]
    options += ["--cache-dir", str(ROOT / ".mypy_cache" / "readme")]
    right, wrong = tmp_path / "readme.py", tmp_path / "calls.py"
    right.write_text(AT_HAND + "\n".join(blocks))
    wrong.write_text(AT_HAND + "\n".join(blocks) + CALLS)
    said, errors, _ = api.run([*options, str(right), str(wrong)])
    # torch leaves `Tensor.backward` without types: that one is not README's.
    found = [line for line in said.splitlines() if ": error:" in line and '"backward"' not in line]
    assert len(found) == 1 and "calls.py" in found[0] and '"state"' in found[0], said + errors
