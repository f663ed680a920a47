"""CrossanModel inside transformers' Trainer as it is: training, evaluation, prediction, saving, resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossan_fast import CrossanConfig, CrossanModel, CrossanOutput, HiddenStateCache, Modality
from crossan_fast.cache.writer import write_cache

ITEMS, WINDOW, ROWS = 20, 4, 24


def make_cache(folder: Path) -> HiddenStateCache:
    generator = torch.Generator().manual_seed(0)
    states = {name: torch.randn(ITEMS + 1, 3, width, generator=generator) for name, width in WIDTHS}
    for state in states.values():
        state[0] = 0
    write_cache(folder, states, item_names=[f"item{i}" for i in range(1, ITEMS + 1)])
    return HiddenStateCache.open(folder)


WIDTHS = (("text", 12), ("image", 20))


def make_rows() -> list[dict[str, torch.Tensor]]:
    """The next item follows on a ring."""
    starts = torch.randint(ITEMS, (ROWS,), generator=torch.Generator().manual_seed(1))
    rows = (starts[:, None] + torch.arange(WINDOW + 1)) % ITEMS + 1
    rows[::3, :2] = 0
    return [{"item_ids": row} for row in rows]


def make_trainer(folder: Path, cache: HiddenStateCache, **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = CrossanConfig(cache.modalities, embedding_dim=16, bottleneck=8, window=WINDOW, blocks=1)
    model = CrossanModel(config, backend="eager")
    model.set_popularity(torch.ones(ITEMS + 1))
    arguments = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 10,
        "learning_rate": 1e-2,
        "num_train_epochs": 4,
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {"item_ids": torch.stack([row["item_ids"] for row in rows]), "cache": cache}

    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **arguments),
        data_collator=collate,
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        compute_metrics=arguments.get("label_names") and hits,
    )


def hits(evaluated: Any) -> dict[str, float]:
    """HR@1 of the last target among all items of the dataset that its row has not had before."""
    users, items = evaluated.predictions
    ids = evaluated.label_ids
    names = ids.reshape(-1)
    scores = users[:, -1] @ items.reshape(-1, items.shape[-1]).T
    had = (names == 0) | (ids[:, :-1, None] == names).any(axis=1)
    best = names[np.where(had, -np.inf, scores).argmax(axis=1)]
    return {"hr@1": float((best == ids[:, -1]).mean())}


def test_it_trains_evaluates_and_predicts(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", make_cache(tmp_path / "cache"), eval_strategy="epoch", load_best_model_at_end=True
    )
    before = trainer.evaluate()["eval_loss"]
    first = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    assert all(
        not torch.equal(value, first[name])
        for name, value in trainer.model.state_dict().items()
        if name.startswith(("towers", "heads")) and "gate" not in name
    )
    predicted = trainer.predict(trainer.eval_dataset)
    users, items = predicted.predictions
    assert users.shape == (ROWS, WINDOW, 16)
    assert items.shape == (ROWS, WINDOW + 1, 16)
    ids = torch.stack([row["item_ids"] for row in trainer.eval_dataset])
    cache = trainer.data_collator(trainer.eval_dataset)["cache"]
    expected = trainer.model.eval()(ids, cache=cache)
    torch.testing.assert_close(torch.from_numpy(users), expected.user_embeddings)


def test_metrics_get_the_targets_where_item_ids_are_the_labels(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        make_cache(tmp_path / "cache"),
        label_names=["item_ids"],
        save_strategy="no",
        num_train_epochs=15,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_hr@1"] > 0.5
    assert metrics["eval_loss"] < trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_resumed_run_is_the_whole_run(tmp_path: Path, precision: dict[str, bool]) -> None:
    cache = make_cache(tmp_path / "cache")
    whole = make_trainer(tmp_path / "whole", cache, gradient_accumulation_steps=2, **precision)
    whole.train()
    again = make_trainer(tmp_path / "whole", cache, gradient_accumulation_steps=2, **precision)
    middle = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[1]
    # A config beside the weights makes of a checkpoint what `from_pretrained` reads; Trainer reads it too.
    (middle / "config.json").write_text(whole.model.config.to_json())
    loaded = CrossanModel.from_pretrained(middle)
    assert torch.equal(loaded.item_popularity, whole.model.item_popularity)
    again.train(resume_from_checkpoint=str(middle))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_its_loggers_read_the_config(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run",
        make_cache(tmp_path / "cache"),
        report_to="tensorboard",
        max_steps=2,
        include_num_input_tokens_seen=True,
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen > 0, "item_ids are the tokens"
    assert json.loads(trainer.model.config.to_json_string())["embedding_dim"] == 16


def test_the_config_stays_what_it_was() -> None:
    config = CrossanConfig([Modality("text", 8, 2)])
    other = copy.copy(config)
    config.use_cache = False  # type: ignore[attr-defined]
    assert (config == other, hash(config) == hash(other), repr(config) == repr(other)) == (True,) * 3
    assert CrossanConfig.from_json(config.to_json()) == config
    assert "use_cache" not in config.to_json()
    for name in ("dropout", "towers", "dropuot", "use_cach"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(config, name, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.dropout


def test_the_output_is_read_by_name_and_by_place() -> None:
    out = CrossanOutput(torch.zeros(()), torch.ones(2, 3, 4), torch.ones(2, 4, 4))
    loss, users, items = out
    assert loss is out.loss is out[0] is out["loss"] is out.to_tuple()[0]
    assert users is out["user_embeddings"] is out[1:][0]
    assert items is out[-1] is dict(**out)["item_embeddings"]
    assert type(out.to_tuple()) is type(out[1:]) is tuple
    assert list(out.keys()) == ["loss", "user_embeddings", "item_embeddings"]
    assert torch.equal(pickle.loads(pickle.dumps(out)).user_embeddings, users)
    with pytest.raises(KeyError, match=r"output: expected one of \['loss', .* got 'logits'"):
        out["logits"]
    with pytest.raises(IndexError):
        out[3]
    with pytest.raises(AttributeError):
        out.loss = loss  # type: ignore[misc]


def test_none_of_it_imports_transformers() -> None:
    script = "import sys, crossan_fast; print('transformers' in sys.modules, 'accelerate' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
