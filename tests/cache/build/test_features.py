"""States that exist already become a cache, in every form and with every mapping of rows to items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from crossan_fast.cache import HiddenStateCache, import_features
from crossan_fast.cache.build.features import match, open_features
from crossan_fast.cli import main
from crossan_fast.data.items import ItemTable

NAMES = [f"B{k:02}" for k in range(7)]
STATES = torch.randn(7, 3, 4, generator=torch.Generator().manual_seed(0))


def write(folder: Path, form: str, states: torch.Tensor = STATES) -> Path:
    """The states in one form; those that go by name hold the items in another order."""
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1)).tolist()
    path = folder / form
    if form == "array.npy":
        np.save(path, states.numpy())
    elif form == "array.safetensors":
        save_file({"states": states}, path)
    elif form == "array.pt":
        torch.save(states, path)
    elif form == "named.safetensors":
        save_file({NAMES[k]: states[k].clone() for k in order}, path)
    elif form == "named.pt":
        torch.save({NAMES[k]: states[k].clone() for k in order}, path)
    else:  # IISAN's: a file an item, of a list of levels or of one tensor
        path.mkdir()
        for k in order:
            torch.save(
                list(states[k].clone()) if k % 2 else states[k : k + 1].clone(), path / f"{NAMES[k]}.pt"
            )
    return path


FORMS = ("array.npy", "array.safetensors", "array.pt", "named.safetensors", "named.pt", "folder")


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    items = ItemTable(NAMES, {})
    report = import_features(
        {"text": write(tmp_path, form)}, tmp_path / "c", items=items, dtype="fp32", progress=False
    )
    cache = HiddenStateCache.open(tmp_path / "c")
    assert cache.item_names[1:] == NAMES
    assert torch.equal(cache.gather(torch.arange(1, 8))["text"], STATES)
    by = "order" if form.startswith("array") else "name"
    assert str(report) == f"text: 7 of 7 items matched by {by}"


def test_flat_and_half_precision(tmp_path: Path) -> None:
    flat = STATES[:, 0].bfloat16()
    path = write(tmp_path, "array.safetensors", flat)
    import_features({"text": path}, tmp_path / "c", items=ItemTable(NAMES, {}), dtype="fp32", progress=False)
    cache = HiddenStateCache.open(tmp_path / "c")
    assert torch.equal(cache.gather(torch.arange(1, 8))["text"], flat.float()[:, None])


IDS = {
    "mmrec": "asin\titemID\n" + "".join(f"{NAMES[k]}\t{k}\n" for k in (3, 0, 6, 1, 2, 5, 4)),
    "from one": "row,name\n" + "".join(f"{k + 1},{NAMES[k]}\n" for k in (3, 0, 6, 1, 2, 5, 4)),
    "lines": "".join(f"{name}\n" for name in NAMES),
    "items": "".join(f"{name}\tTitle {name}\n" for name in NAMES),
    "numbered items": "item,title\n" + "".join(f"{k + 1},Title\n" for k in range(7)),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_files(tmp_path: Path, kind: str) -> None:
    ids = tmp_path / "ids.csv"
    ids.write_text(IDS[kind])
    found = open_features(write(tmp_path, "array.npy"), ids, "here")
    assert found.names == (NAMES if kind != "numbered items" else [str(k + 1) for k in range(7)])
    for row in range(7):
        assert np.array_equal(found.read(row), STATES[row].numpy())


ORDER = (3, 0, 6, 1, 2, 5, 4)
TWO_NUMBERS = {
    "an index and names": (
        "id,item_id",
        enumerate(ORDER),
        [str(k) for k in ORDER],
        "'id', names in 'item_id'",
    ),
    "names and an index": (
        "item_id,id",
        ((k, n) for n, k in enumerate(ORDER)),
        [str(k) for k in ORDER],
        "'id'",
    ),
    "from one": ("asin,id", ((k, n) for n, k in enumerate(ORDER, 1)), [str(k) for k in ORDER], "'id'"),
    "two from one": ("id,item_id", ((n, n + 1) for n in range(7)), list("1234567"), "'id'"),
    "called so": ("item_id,row", ((n, k) for n, k in enumerate(ORDER)), list("1340652"), "'row'"),
    "alike": ("id,item_id", ((n, n) for n in range(7)), list("0123456"), "'item_id'"),
}


@pytest.mark.parametrize("kind", TWO_NUMBERS)
def test_of_two_columns_of_numbers_the_index_numbers_the_rows(tmp_path: Path, kind: str) -> None:
    header, rows, names, said = TWO_NUMBERS[kind]
    ids = tmp_path / "ids.csv"
    ids.write_text("".join(f"{line}\n" for line in [header, *(f"{a},{b}" for a, b in rows)]))
    found = open_features(write(tmp_path, "array.npy"), ids, "here")
    assert found.names == names and f"row numbers in column {said}" in found.ids


def test_two_columns_that_could_number_the_rows_are_refused(tmp_path: Path) -> None:
    ids = tmp_path / "ids.csv"
    ids.write_text("id,item_id\n" + "".join(f"{k},{(k + 2) % 7}\n" for k in ORDER))
    message = (
        r"here: .*ids.csv: expected one column of row numbers, got 'id' or 'item_id'.*call the right one"
    )
    with pytest.raises(ValueError, match=message):
        open_features(write(tmp_path, "array.npy"), ids, "here")
    features = write(tmp_path, "array.npy")
    ids.write_text(ids.read_text().replace("id,item_id", "row,item_id"))
    report = import_features({"image": features}, tmp_path / "c", ids=ids, progress=False)
    assert str(report).startswith(f"{ids}: row numbers in column 'row', names in 'item_id'\nimage: 7 of 7")


def test_mmrec_features_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its .npy with its mapping, for items of which some have no features, and more added later."""
    features, ids = write(tmp_path, "array.npy"), tmp_path / "i_id_mapping.csv"
    ids.write_text(IDS["mmrec"])
    items, out = tmp_path / "items.tsv", tmp_path / "c"
    command = [
        "cache",
        "import",
        f"image={features}",
        "--ids",
        str(ids),
        "--out",
        str(out),
        "--items",
        str(items),
    ]
    command += ["--dtype", "fp32", "--no-progress"]
    items.write_text("".join(f"{name}\tTitle\n" for name in ("B05", "new", "B01", "B00")))
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "i_id_mapping.csv: row numbers in column 'itemid', names in 'asin'" in said
    assert "3 of 4 items matched by name; 1 items without features, such as 'new'" in said
    assert "4 rows of no item, such as 'B02', 'B03', 'B04'" in said and "4 items added" in said
    cache = HiddenStateCache.open(out)
    assert torch.equal(cache.gather(torch.tensor([1, 3, 4]))["image"], STATES[[5, 1, 0]])
    assert cache.present[:, 0].tolist() == [False, True, False, True, True]
    items.write_text(items.read_text() + "B06\tTitle\n")
    assert main(command) == 0
    assert "1 items added" in capsys.readouterr().out
    assert main([*command, "--strict"]) == 2
    assert "expected a row for each item and no others: 4 of 5 items" in capsys.readouterr().err


def test_without_items_the_rows_name_them(tmp_path: Path) -> None:
    import_features({"image": write(tmp_path, "array.npy")}, tmp_path / "c", progress=False)
    assert HiddenStateCache.open(tmp_path / "c").item_names[1:] == list("0123456"), (
        "as MMRec's .inter has them"
    )
    import_features({"text": write(tmp_path, "folder")}, tmp_path / "d", progress=False)
    assert sorted(HiddenStateCache.open(tmp_path / "d").item_names[1:]) == NAMES


def test_one_odd_file_costs_its_item_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, "folder")
    torch.save(torch.zeros(2, 4), folder / "B03.pt")
    with pytest.warns(UserWarning, match="1 lack 'text'"):
        import_features({"text": folder}, tmp_path / "c", items=ItemTable(NAMES, {}), progress=False)
    assert (
        r"expected floats [3, 4] as the first item has, got [2, 4]"
        in (tmp_path / "c" / "report.tsv").read_text()
    )


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run by a file",)


def test_bad_features_are_named(tmp_path: Path) -> None:
    names, code = tmp_path / "names.txt", tmp_path / "code.pt"
    names.write_text("a\nb\n")
    torch.save({"a": _Code()}, code)
    np.save(tmp_path / "ints.npy", np.zeros((3, 2), dtype=int))
    (tmp_path / "none").mkdir()
    array = write(tmp_path, "array.npy")
    for source, ids, message in (
        (array, names, r"expected 7 items in .*names\.txt, one a row of the features, got 2"),
        (write(tmp_path, "folder"), names, r"has names of its own, expected no ids file"),
        (code, None, r"code\.pt cannot be read as tensors alone"),
        (tmp_path / "ints.npy", None, r"expected floats \[I, D\] or \[I, L, D\], got int64 \[3, 2\]"),
        (tmp_path / "none", None, r"expected \.pt, \.pth or \.npy files in .*none, one an item, found none"),
        (names, None, r"expected a \.npy of floats, got .*names\.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            open_features(source, ids, "here")
    found = open_features(tmp_path / "folder", None, "here")
    with pytest.raises(
        ValueError, match=r"none of 2 items has a row in .*folder: items are called 'x', 'y', rows 'B0"
    ):
        match(found, ["x", "y"], "here")
    with pytest.raises(FileNotFoundError, match=r"here: no such file: nowhere"):
        open_features(Path("nowhere"), None, "here")
