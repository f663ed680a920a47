"""RecBole's own reader on the files that ours reads: the same interactions, and the same targets held out.

RecBole pins packages of years ago and is no part of the test extra: `pip install --no-deps recbole colorlog
colorama thop tabulate texttable`, and this file runs.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossan_fast.data import leave_one_out, read_interactions

pytest.importorskip("recbole")

FIELDS = {"USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp"}


@pytest.fixture(autouse=True)
def _as_it_expects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that NumPy 2 dropped, and a folder for the log/ that it makes where it stands."""
    for name, value in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        monkeypatch.setattr(np, name, value, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """`shop/shop.inter`, in no order; names that are numbers, as RecBole's own data sets have them."""
    drawn = random.Random(3)
    rows = [
        f"{user}\t{drawn.randrange(30)}\t{drawn.randrange(1, 6)}\t{1_500_000_000 + 1000 * step + user}\n"
        for user in range(25)
        for step in range(drawn.randrange(4, 12))
    ]
    drawn.shuffle(rows)
    folder = tmp_path / "shop"
    folder.mkdir()
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "shop.inter").write_text(head + "".join(rows))
    return folder


def read_by_recbole(shop: Path, **settings: Any) -> Any:
    from recbole.config import Config
    from recbole.data import create_dataset

    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    given = {"data_path": str(shop.parent), "load_col": columns, "state": "ERROR", **FIELDS, **settings}
    return create_dataset(Config(model="BPR", dataset="shop", config_dict=given))


def sequences(dataset: Any, feature: Any) -> dict[str, list[str]]:
    """Each user's items in time order, by name."""
    names = {field: dataset.field2id_token[field] for field in ("user_id", "item_id")}
    rows = sorted(
        zip(*(feature[field].tolist() for field in ("timestamp", "user_id", "item_id")), strict=True)
    )
    found: dict[str, list[str]] = {}
    for _, user, item in rows:
        found.setdefault(str(names["user_id"][user]), []).append(str(names["item_id"][item]))
    return found


@pytest.mark.parametrize("rating", [None, 3.0])
def test_interactions_are_those_that_recbole_reads(shop: Path, rating: float | None) -> None:
    settings = {} if rating is None else {"val_interval": {"rating": f"[{rating},inf)"}}
    dataset = read_by_recbole(shop, **settings)
    ours = read_interactions(shop / "shop.inter", None, min_items=1, min_rating=rating, max_items=None)
    found = {name: [ours.name_of(row) for row in ours.sequence(u)] for u, name in enumerate(ours.user_names)}
    assert found == sequences(dataset, dataset.inter_feat)


def test_the_targets_are_recbole_s(shop: Path) -> None:
    arguments = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    dataset = read_by_recbole(shop, eval_args=arguments)
    train, validation, test = dataset.build()
    ours = read_interactions(shop / "shop.inter", None, min_items=3)
    split = leave_one_out(ours, window=20)
    names = ours.item_names
    for part, targets in ((validation, split.validation_target), (test, split.test_target)):
        theirs = sequences(dataset, part.inter_feat)
        assert {u: [names[row]] for u, row in zip(ours.user_names, targets.tolist(), strict=True)} == theirs
    theirs = sequences(dataset, train.inter_feat)
    for user, row in zip(ours.user_names, split.train.tolist(), strict=True):
        assert [names[item] for item in row if item] == theirs[user]
