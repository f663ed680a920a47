"""What a run leaves beside its model for people and hubs: training.json and a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from crossan_fast import CrossanModel
from crossan_fast._digests import sealed
from crossan_fast.cache.writer import write_cache
from crossan_fast.training import TrainConfig, train

SOURCES = {
    "text": {"encoder": "/home/me/encoders/bert", "pool": "mean", "layers": [0, 2, 4], "fingerprint": "ab"},
    "image": {"encoder": "owner/vit", "pool": "cls", "layers": [0, 2, 4]},
}


@pytest.fixture
def run(values: dict[str, Any], tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(7)
    states = {name: torch.randn(31, 3, width, generator=generator) for name, width in WIDTHS}
    for state in states.values():
        state[0] = 0
    write_cache(tmp_path / "cache", states, item_names=[f"item{i}" for i in range(1, 31)], sources=SOURCES)
    values |= {"cache": str(tmp_path / "cache"), "epochs": 1}
    train(TrainConfig.from_dict(values), progress=False)
    return Path(values["run"])


WIDTHS = (("text", 12), ("image", 20))


def test_a_run_says_what_it_trained_on_and_reached(run: Path, tmp_path: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    population = json.loads((run / "population.json").read_text())
    record = json.loads((run / "best" / "training.json").read_text())
    for key in ("test", "validation", "versions", "parameters", "best_epoch"):
        assert record[key] == results[key]
    assert record["data"]["names"] == population["names"]
    assert record["data"]["sequences"] == population["sequences"]
    assert record["sources"]["image"] == SOURCES["image"]
    assert record["sources"]["text"]["encoder"] == "bert"
    assert record["settings"]["optimizer.learning_rate"] == 1e-2
    text = (run / "best" / "README.md").read_text() + json.dumps(record)
    assert str(tmp_path) not in text and "/home/me" not in text, "no path of this machine"
    card = ModelCard.load(run / "best" / "README.md")
    assert card.data.library_name == "crossan_fast" and "crossan" in card.data.tags
    assert card.data.metrics == ["hr", "mrr", "ndcg"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: round(value, 6) for name, value in results["test"]["metrics"].items()}
    assert {result.dataset_name for result in card.data.eval_results} == {results["test"]["protocol"]}
    assert "| text | 12 | [0, 2, 4] | bert | mean |" in card.text
    assert results["test"]["protocol"] in card.text and population["sequences"] in card.text


def test_it_goes_with_the_model_until_that_is_trained_on(run: Path, tmp_path: Path) -> None:
    model = CrossanModel.from_pretrained(run / "best")
    model.save_pretrained(tmp_path / "copy")
    for name in ("training.json", "README.md", "config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (run / "best" / name).read_bytes()
    with torch.no_grad():
        model.heads["text"].bias.add_(1)  # type: ignore[operator,union-attr]
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "training.json").exists()
    assert "ndcg" not in (tmp_path / "copy" / "README.md").read_text()
    # Weights of another save beside a record: it is not of these.
    (tmp_path / "copy" / "training.json").write_bytes((run / "best" / "training.json").read_bytes())
    assert CrossanModel.from_pretrained(tmp_path / "copy").training_record is None


def test_a_damaged_or_forged_record_is_refused(run: Path) -> None:
    path = run / "best" / "training.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "best_epoch": 99}))
    with pytest.raises(ValueError, match=r"training\.json is damaged or was changed by hand"):
        CrossanModel.from_pretrained(run / "best")
    record.pop("sha256")
    for forged in (
        {**record, "test": {"metrics": 3}},
        {**record, "data": []},
        {**record, "data": {**record["data"], "users": "many"}},
        {**record, "sources": {"text": 1}},
        [record],
    ):
        path.write_text(json.dumps(sealed(forged) if isinstance(forged, dict) else forged))
        with pytest.raises(ValueError, match=r"training\.json: expected"):
            CrossanModel.from_pretrained(run / "best")


def test_a_readme_of_ones_own_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("Mine.")
    CrossanModel.from_pretrained(run / "best").save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "Mine."
