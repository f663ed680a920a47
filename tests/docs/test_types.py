"""README's and the site's Python under `mypy --strict`, and what a call of the model is to a type checker.

A page's blocks are one program, since they go on from each other; those that are marked as compiled only
lack what they name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, blocks

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

# Other libraries, all but torch and numpy, are Any: reading them takes minutes, and their types are theirs.
SETTINGS = """\
[mypy]
strict = true
follow_imports = silent
ignore_missing_imports = true
[mypy-transformers.*,peft.*,lightning.*,accelerate.*,pandas.*,pyarrow.*,matplotlib.*,triton.*,rich.*]
follow_imports = skip
[mypy-huggingface_hub.*,tensorboard.*,PIL.*,scipy.*]
follow_imports = skip
"""

# torch leaves `Tensor.backward` without types; a class of what is Any is the price of the settings.
NOT_OURS = ('"backward"', 'Class cannot subclass "LightningModule"')


def programs(folder: Path) -> Iterator[Path]:
    """A file a page, with its lines where the page has them."""
    for page in PAGES:
        text = ""
        for block in blocks(page):
            if block.language == "python" and block.runs:
                text += "\n" * (block.line - text.count("\n")) + block.text
        if text:
            file = folder / f"{page.stem.replace('-', '_')}_page.py"
            file.write_text(AT_HAND + text if page.name == "README.md" else text)
            yield file


@pytest.mark.long  # mypy reads torch
def test_every_page_passes_mypy_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api")
    files = list(programs(tmp_path))
    assert len(files) > 8
    settings, wrong = tmp_path / "mypy.ini", tmp_path / "calls.py"
    settings.write_text(SETTINGS)
    wrong.write_text((tmp_path / "README_page.py").read_text() + CALLS)
    monkeypatch.chdir(ROOT)
    options = ["--config-file", str(settings), "--cache-dir", str(ROOT / ".mypy_cache" / "docs")]
    said, errors, _ = api.run([*options, *map(str, files), str(wrong)])
    found = [line for line in said.splitlines() if ": error:" in line]
    ours = [line for line in found if not any(words in line for words in NOT_OURS)]
    assert len(ours) == 1 and "calls.py" in ours[0] and '"state"' in ours[0], said + errors
