"""One made-up population in every form that people have it in, against a plain loop over its events."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossan_fast.data import Interactions, read_interactions, read_items, split_files

Write = Callable[..., Path]
Event = tuple[str, str, int, float, int]

_RNG = random.Random(5)
START = 1_577_836_800  # 2020-01-01, seconds
# Users come and go, several events fall into one second, and ratings and splits go with them.
EVENTS: list[Event] = [
    (f"u{_RNG.randrange(9)}", f"i{_RNG.randrange(30)}", START + _RNG.randrange(40), _RNG.randrange(1, 6), 0)
    for _ in range(300)
]


def expected(events: list[Event] = EVENTS) -> dict[str, list[str]]:
    """Per user in time order; equal times keep the order of the log."""
    sequences: dict[str, list[tuple[int, str]]] = {}
    for user, item, time, _, _ in events:
        sequences.setdefault(user, []).append((time, item))
    return {user: [item for _, item in sorted(seq, key=lambda e: e[0])] for user, seq in sequences.items()}


def named(found: Interactions) -> dict[str, list[str]]:
    return {
        user: [found.name_of(row) for row in found.sequence(u).tolist()]
        for u, user in enumerate(found.user_names)
    }


def lines(separator: str, header: str, *, time: Callable[[int], str] = str, end: str = "\n") -> str:
    rows = [(u, i, str(r), time(t)) for u, i, t, r, _ in EVENTS]
    return end.join([header.replace(" ", separator), *(separator.join(row) for row in rows)]) + end


def iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def amazon(event: Event) -> str:
    user, item, time, rating, _ = event
    review = {"rating": float(rating), "title": "Fine", "images": [], "asin": f"x{item}", "parent_asin": item}
    return json.dumps({**review, "user_id": user, "timestamp": time * 1000, "verified_purchase": True})


TEXTS = {
    "csv": (
        lines(",", "user item rating timestamp"),
        "comma-separated text.*, an interaction a row .user 'user', item 'item', time 'timestamp'.; ",
    ),
    "windows": ("\ufeff" + lines("\t", "UserId MovieId Rating Timestamp", end="\r\n"), "movieid"),
    "semicolons": (lines(";", "User-ID Product_ID rating Date", time=iso), "semicolon-separated"),
    "ms": (lines(",", "user item rating time", time=lambda t: str(t * 1000)), "times in ms"),
    "naive": (lines(",", "user item rating time", time=lambda t: iso(t).removesuffix("Z")), "times in ns"),
    "recbole": (
        lines("\t", "user_id:token item_id:token rating:float timestamp:float", time=lambda t: f"{t}.0"),
        "a RecBole atomic file.*, an interaction a row .user 'user_id', item 'item_id', time 'timestamp'",
    ),
    "mmrec": (lines("\t", "userID itemID rating timestamp"), "user 'userid'"),
    "amazon": ("".join(amazon(event) + "\n" for event in EVENTS), "JSON lines, .*item 'parent_asin'"),
    "array": (f"[{', '.join(map(amazon, EVENTS))}]", "a JSON array"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("form", TEXTS)
def test_texts(write: Write, form: str, zipped: bool) -> None:
    text, said = TEXTS[form]
    content = gzip.compress(text.encode()) if zipped else text.encode()
    found = read_interactions(write(content, "events"), None, min_items=1)
    assert named(found) == expected()
    assert found.user_names == list(expected()), "in order of first appearance"
    assert re.search(said, found.taken_for), found.taken_for
    assert ("gzipped" in found.taken_for) == zipped
    assert found.times is not None and found.times.shape == found.ids.shape
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[found.time_unit or "s"]
    assert sorted(found.times.tolist()) == sorted(event[2] * per_second for event in EVENTS)


def need_pandas() -> Any:
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra `formats`")
    return pytest.importorskip("pandas", reason="needs pandas, of the extra `test`")


def pandas_frame() -> Any:
    return need_pandas().DataFrame(EVENTS, columns=["user", "item", "timestamp", "rating", "split"])


def test_frames_parquet_and_datasets(tmp_path: Path) -> None:
    frame = pandas_frame()
    frame["note"] = [object() for _ in EVENTS]  # what is not asked for may be anything
    found = read_interactions(frame, None, min_items=1)
    assert named(found) == expected() and "a pandas DataFrame" in found.taken_for
    dated = frame[["user", "item"]].assign(when=frame["timestamp"].astype("datetime64[s]"))
    assert named(read_interactions(dated, None, min_items=1, columns={"time": "when"})) == expected()
    dated.to_parquet(tmp_path / "events.parquet", row_group_size=37)
    columns = {"time": "When"}
    found = read_interactions(tmp_path / "events.parquet", None, min_items=1, columns=columns)
    assert named(found) == expected() and "a Parquet file" in found.taken_for and found.time_unit == "ns"
    numbers = frame[["timestamp"]].assign(
        user=[int(u[1:]) for u in frame["user"]], item=frame["item"].astype("category")
    )
    numbers["user"] = numbers["user"].astype(float)  # as pandas makes them where one is missing
    assert named(read_interactions(numbers, None, min_items=1)) == {u[1:]: s for u, s in expected().items()}
    lists = need_pandas().DataFrame({"who": list(expected()), "what": list(expected().values())})
    wishes = {"user": "who", "items": "what"}
    assert named(read_interactions(lists, None, min_items=1, columns=wishes)) == expected()
    frame.loc[7, "user"] = None
    with pytest.raises(ValueError, match=r"a pandas DataFrame, row 8: the user's name is empty"):
        read_interactions(frame, None)


@pytest.mark.parametrize("form", ["frame", "table", "parquet", "jsonl", "json", "csv"])
@pytest.mark.parametrize("names", [("User_ID", "user id"), ("Note", "note")], ids=["a role", "none"])
def test_two_columns_of_one_name_are_refused(form: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Also where no role asks for them: what an items file's columns are called is what encoders read."""
    frame = pandas_frame().rename(columns={"user": "client"})
    frame[names[0]], frame[names[1]] = "a", "b"
    path, source = tmp_path / f"events.{form}", frame
    if form == "table":
        source = pytest.importorskip("pyarrow").Table.from_pandas(frame)
    elif form != "frame":
        source = path
        kinds = {"csv": {"index": False}, "json": {"orient": "records"}}
        kinds["jsonl"] = kinds["json"] | {"lines": True}
        getattr(frame, f"to_{form.removesuffix('l')}")(path, **kinds.get(form, {}))
    both = f"got {names[0]!r} and {names[1]!r}, which are both read as {names[1].replace(' ', '_')!r}"
    with pytest.raises(ValueError, match=f"users: .*expected different column names, {both}"):
        read_interactions(source, None, columns={"user": "client"})
    with pytest.raises(ValueError, match=f"items: .*expected different column names, {both}"):
        read_items(source)


def test_keys_of_one_name_in_different_objects_are_refused(write: Write) -> None:
    path = write('{"user": "u", "Item": "a"}\n{"user": "u", "item": "b"}\n', "users.jsonl")
    with pytest.raises(ValueError, match=r"users\.jsonl: expected different .* 'Item' and 'item', which are"):
        read_interactions(path, None)


@pytest.mark.parametrize("library", ["polars", "datasets"])
def test_frames_of_other_libraries(library: str) -> None:
    frame = pandas_frame()
    made = pytest.importorskip(library)
    if library == "polars":
        other = made.DataFrame({name: frame[name].tolist() for name in frame.columns})
    else:
        other = made.Dataset.from_pandas(frame)
    assert named(read_interactions(other, None, min_items=1)) == expected()
    assert library in read_interactions(other, None, min_items=1).taken_for
    items = made.DataFrame({"item": ["a"], "title": ["A lamp"]}) if library == "polars" else None
    if items is not None:
        assert read_items(items).columns == {"title": ["A lamp"]}


def test_microlens_in_its_forms(microlens: Path, tmp_path: Path) -> None:
    """The real pairs TSV, and what it was made from: a CSV of events with Windows' ends of lines."""
    text = "".join((microlens / "users.tsv").read_text().splitlines(keepends=True)[:3000])
    (tmp_path / "users.tsv").write_text(text)
    pairs = read_interactions(tmp_path / "users.tsv", None, max_items=13)
    events = [
        (user, item, t)
        for user, row in (line.split("\t") for line in text.splitlines())
        for t, item in enumerate(row.split())
    ]
    random.Random(0).shuffle(events)
    rows = "".join(f"{user},{item},{1_500_000_000_000 + t}\r\n" for user, item, t in events)
    (tmp_path / "pairs.csv").write_bytes(b"user,item,timestamp\r\n" + rows.encode())
    (tmp_path / "pairs.tsv").write_bytes(text.replace("\n", "\r\n").encode())
    from_events = read_interactions(tmp_path / "pairs.csv", None, max_items=13)
    assert named(read_interactions(tmp_path / "pairs.tsv", None, max_items=13)) == named(pairs)
    assert named(from_events) == named(pairs) and from_events.time_unit == "ms"


def test_ratings_have_a_minimum(write: Write) -> None:
    path = write(TEXTS["csv"][0], "users.csv")
    found = read_interactions(path, None, min_items=1, min_rating=4)
    assert named(found) == expected([event for event in EVENTS if event[3] >= 4])
    assert found.dropped.low_ratings == sum(event[3] < 4 for event in EVENTS)
    with pytest.raises(ValueError, match=r"min_rating: expected a column of ratings in .*, found none"):
        read_interactions(write("u\ta b c\n", "users.tsv"), None, min_rating=4)
    with pytest.raises(ValueError, match=r"line 2: expected a finite number as rating, got 'good'"):
        read_interactions(write("user,item,rating\nu,a,good\n", "bad.csv"), None, min_rating=4)


def test_splits_that_come_with_the_data(write: Write, tmp_path: Path) -> None:
    """MMRec's label, and a file for each part: training first, whatever the times say."""
    rows = [("7", "1", 30, 0), ("7", "2", 10, 2), ("7", "3", 20, 1), ("7", "4", 5, 0), ("8", "1", 1, 0)]
    text = "userID\titemID\trating\ttimestamp\tx_label\n" + "".join(
        f"{u}\t{i}\t5.0\t{t}\t{x}\n" for u, i, t, x in rows
    )
    found = read_interactions(write(text, "baby.inter"), None, min_items=1, labels=True)
    assert named(found) == {"7": ["4", "1", "3", "2"], "8": ["1"]} and "label 'x_label'" in found.taken_for
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 2, 0]
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    for part, label in (("train", 0), ("valid", 1), ("test", 2)):
        write(header + "".join(f"{u}\t{i}\t{t}\n" for u, i, t, x in rows if x == label), f"baby.{part}.inter")
    files = split_files(tmp_path / "baby.train.inter")
    assert files is not None and files["validation"] == tmp_path / "baby.valid.inter"
    parts = read_interactions(files, None, min_items=1)
    assert named(parts) == named(found) and parts.labels.tolist() == found.labels.tolist()
    assert split_files(tmp_path / "baby.inter") is None
    with pytest.raises(
        ValueError, match=r"parts named train, validation and test, got 'tset'; did you mean 'test'"
    ):
        read_interactions({"tset": files["test"]}, None)
    with pytest.raises(ValueError, match=r"line 2: expected a split 0, 1, 2 or train, .* got '5'"):
        read_interactions(write("user,item,split\na,b,5\n", "bad.csv"), None, labels=True)


@pytest.mark.parametrize("name", ["x_label", "split"])
def test_a_split_that_nobody_asked_for_orders_nothing(write: Write, name: str) -> None:
    """The last item is the last in time, not the one that some split tests with."""
    rows = "u,a,1,0\nu,b,3,2\nu,c,2,1\nu,d,4,0\n"
    path = write(f"user,item,timestamp,{name}\n{rows}", "log.csv")
    found = read_interactions(path, None, min_items=1)
    assert named(found) == {"u": ["a", "c", "b", "d"]} and found.labels is None
    assert "label" not in found.taken_for and "time 'timestamp'" in found.taken_for
    for wish in ({"labels": True}, {"columns": {"label": name}}):
        given = read_interactions(path, None, min_items=1, **wish)
        assert named(given) == {"u": ["a", "d", "c", "b"]} and f"label '{name}'" in given.taken_for
    columns: dict[str, str | int] = {"label": name}
    assert named(read_interactions(path, None, min_items=1, columns=columns, labels=False)) == named(found)
    parts = read_interactions({"train": path}, None, min_items=1)
    assert "label" not in parts.taken_for, "files say which part they are"


def test_histories_with_their_next_item(write: Write, tmp_path: Path) -> None:
    """RecBole's sequential benchmarks: rows of prefixes, of which the longest holds all."""
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    write(header + "u\ta\tb\nu\ta b\tc\nv\td\te\n", "x.train.inter")
    write(header + "u\ta b c\tf\nv\td e\tg\n", "x.valid.inter")
    write(header + "u\ta b c f\th\n", "x.test.inter")
    found = read_interactions(split_files(tmp_path / "x.train.inter") or {}, None, min_items=1)
    assert named(found) == {"u": ["a", "b", "c", "f", "h"], "v": ["d", "e", "g"]}
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1, 2, 0, 0, 1]
    assert "histories with their next item" in found.taken_for


LISTS = {
    "json": '{"user": "u", "items": ["c", "a", "b"], "timestamp": [3, 1, 2], "rating": [5, 2, 4]}\n'
    '{"user": "v", "items": ["a"], "timestamp": [7], "rating": [4]}\n',
    "csv": "user,items,timestamp,rating\nv,a,7,4\nu,c a  b, 3 1 2,5 2 4\n",
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_times_and_ratings_go_with_lists_of_items(write: Write, form: str) -> None:
    path = write(LISTS[form], "lists")
    found = read_interactions(path, None, min_items=1)
    assert named(found) == {"v": ["a"], "u": ["a", "b", "c"]}
    assert found.times is not None and sorted(found.times.tolist()) == [1, 2, 3, 7]
    assert "time 'timestamp')" in found.taken_for
    found = read_interactions(path, None, min_items=1, min_rating=4)
    assert named(found) == {"v": ["a"], "u": ["b", "c"]} and found.dropped.low_ratings == 1
    assert "rating 'rating'" in found.taken_for


def test_a_time_for_a_whole_row_is_none_of_its_items(write: Write) -> None:
    rows = '{"user": "v", "items": ["a"], "time": 5}\n{"user": "u", "items": ["c", "a"], "time": 3}\n'
    found = read_interactions(write(rows, "a.jsonl"), None, min_items=1)
    assert named(found) == {"v": ["a"], "u": ["c", "a"]} and found.times is None
    assert "(user 'user', items 'items')" in found.taken_for
    with pytest.raises(ValueError, match=r"line 2: expected 2 times, one for each of the items, got 1"):
        read_interactions(write(rows, "a.jsonl"), None, columns={"time": "time"})
    with pytest.raises(ValueError, match=r"line 1: expected 3 times, one for each of the items, got 2"):
        read_interactions(write('{"user": "u", "items": ["c", "a", "b"], "time": [3, 1]}\n', "b.jsonl"), None)
    rated = write('{"user": "u", "items": ["c", "a"], "rating": 3}\n', "c.jsonl")
    with pytest.raises(ValueError, match=r"line 1: expected 2 ratings, one for each of the items, got 1"):
        read_interactions(rated, None, min_rating=4)
    parted = write('{"user": "u", "items": ["c", "a", "b"], "split": [1, 0, 2]}\n', "d.jsonl")
    found = read_interactions(parted, None, min_items=1, labels=True)
    assert named(found) == {"u": ["a", "c", "b"]} and "label 'split'" in found.taken_for


def test_histories_with_their_next_item_have_no_ratings(write: Write) -> None:
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\trating:float\n"
    path = write(header + "u\ta\tb\t5\nu\ta b\tc\t1\n", "x.inter")
    found = read_interactions(path, None, min_items=1)
    assert named(found) == {"u": ["a", "b", "c"]} and "rating" not in found.taken_for
    with pytest.raises(ValueError, match=r"expected ratings .* got rating 'rating' with histories"):
        read_interactions(path, None, min_rating=4)


def test_columns_are_settable_and_misspellings_get_a_suggestion(write: Write) -> None:
    path = write("Client,Product,Bought at\nc1,p1,2\nc1,p2,1\n", "log.csv")
    wishes: dict[str, str | int] = {"user": "client", "item": "Product", "time": "bought_at"}
    assert named(read_interactions(path, None, min_items=1, columns=wishes)) == {"c1": ["p2", "p1"]}
    ratings = write("1\t10\t3\t881250949\n1\t11\t3\t881250940\n", "u.data")
    places: dict[str, str | int] = {"user": 1, "item": 2, "rating": 3, "time": 4}
    assert named(read_interactions(ratings, None, min_items=1, columns=places)) == {"1": ["11", "10"]}
    for columns, message in (
        (
            {**wishes, "item": "prduct"},
            r"expected a column 'prduct' for items, got .*; did you mean 'product'",
        ),
        ({**wishes, "tme": "x"}, r"columns: expected some of user, .* got 'tme'; did you mean 'time'"),
        ({"user": "client", "item": "product"}, r"none of them is known for times; name it by columns="),
    ):
        with pytest.raises(ValueError, match=message):
            read_interactions(path, None, columns=columns)
    with pytest.raises(ValueError, match=r"expected a column from 1 to 4 for times, got 5"):
        read_interactions(ratings, None, columns={**places, "time": 5})


@pytest.mark.parametrize("times", [("900", "1400"), ("090000", "140000"), ("09:00", "14:00")])
def test_a_time_of_day_beside_a_date_orders_nothing(write: Write, times: tuple[str, str]) -> None:
    text = f"user,item,date,time\nu,a,2020-01-02,{times[0]}\nu,b,2020-01-01,{times[1]}\n"
    path = write(text, "log.csv")
    with pytest.raises(ValueError, match=r"in column 'time', since a column 'date' stands .*--time-column"):
        read_interactions(path, None)
    found = read_interactions(path, None, min_items=1, columns={"time": "date"})
    assert named(found) == {"u": ["b", "a"]}


@pytest.mark.parametrize("times", [("1577836900", "1577836800"), ("2020-01-02T09:00", "2020-01-01 14:00")])
def test_a_full_time_beside_a_date_is_one(write: Write, times: tuple[str, str]) -> None:
    text = f"user,item,date,time\nu,a,2020-01-02,{times[0]}\nu,b,2020-01-01,{times[1]}\n"
    found = read_interactions(write(text, "log.csv"), None, min_items=1)
    assert named(found) == {"u": ["b", "a"]} and "time 'time'" in found.taken_for


@pytest.mark.parametrize("other", ["event_time", "created_at", "ts"])
@pytest.mark.parametrize("first", [True, False])
def test_a_moment_counts_before_its_date(write: Write, other: str, first: bool) -> None:
    """In whichever order the columns stand; by the date alone all three would stay as the file has them."""
    header, cells = ("date", other), [("2020-01-01", f"2020-01-01T{hour}:00:00") for hour in (12, 10, 11)]
    order = 1 if first else -1
    rows = [",".join(("u", item, *pair[::order])) for item, pair in zip("cab", cells, strict=True)]
    path = write("\n".join([",".join(("user", "item", *header[::order])), *rows]) + "\n", "log.csv")
    found = read_interactions(path, None, min_items=1)
    assert named(found) == {"u": ["a", "b", "c"]} and f"time '{other}'" in found.taken_for
    assert named(read_interactions(path, None, min_items=1, columns={"time": "date"})) == {"u": list("cab")}


def two_times(write: Write, pairs: list[tuple[str, str]], users: str = "uuu") -> Path:
    """Items a, b, c with times in two columns."""
    rows = [f"{user},{item},{a},{b}\n" for user, item, (a, b) in zip(users, "abc", pairs, strict=True)]
    return write("user,item,created_at,timestamp\n" + "".join(rows), "log.csv")


@pytest.mark.parametrize(
    "pairs",
    [
        [(str(START + 3), str(START + 1)), (str(START + 2), str(START + 2)), (str(START), str(START + 3))],
        [("2020-01-03", str(START)), ("2020-01-02", str(START)), ("2020-01-01", str(START))],  # all at once
        [("3", "7"), ("1", "8"), ("2", "9")],
    ],
    ids=["two orders", "ties in one, but another order in the other", "counters"],
)
def test_two_columns_of_times_in_two_orders_are_refused(write: Write, pairs: list[tuple[str, str]]) -> None:
    path = two_times(write, pairs)
    message = r"one by column 'timestamp' and another by 'created_at', such as for user 'u'; .*--time-column"
    with pytest.raises(ValueError, match=message):
        read_interactions(path, None, min_items=1)
    for name, place in (("created_at", 0), ("timestamp", 1)):
        found = read_interactions(path, None, min_items=1, columns={"time": name})
        by_hand = [
            item for _, item in sorted(zip((p[place] for p in pairs), "abc", strict=True), key=lambda p: p[0])
        ]
        assert named(found) == {"u": by_hand}


@pytest.mark.parametrize(
    ("pairs", "users"),
    [
        (
            [
                ("2020-01-03T01:00", str(START + 3)),
                ("2020-01-01", str(START)),
                ("2020-01-02", str(START + 1)),
            ],
            "uuu",
        ),
        ([("2020-01-01", str(START + 3)), ("2020-01-01", str(START)), ("2020-01-01", str(START + 1))], "uuu"),
        ([("1500", str(START + 3)), ("1600", str(START)), ("1700", str(START + 1))], "uuu"),
        ([("gone", str(START + 3)), ("", str(START)), ("3", str(START + 1))], "uuu"),
        ([("2020-01-01", str(START + 3)), ("2020-01-02", str(START)), ("2020-01-03", str(START + 1))], "uvw"),
    ],
    ids=["one order", "coarser", "of day", "no times", "of different users"],
)
def test_a_column_of_times_that_says_nothing_else_is_no_matter(
    write: Write, pairs: list[tuple[str, str]], users: str
) -> None:
    found = read_interactions(two_times(write, pairs, users), None, min_items=1)
    of_one = {"u": ["b", "c", "a"]}
    assert named(found) == (of_one if users == "uuu" else {"u": ["a"], "v": ["b"], "w": ["c"]})
    assert "time 'timestamp'" in found.taken_for


def test_times_of_two_units_are_counted(write: Write) -> None:
    text = "user,item,timestamp\n" + "".join(
        f"u,i{k},{(START + k) * (1000 if k % 3 else 1)}\n" for k in range(9)
    )
    message = (
        r"log.csv: expected times of one unit, got 9 that are ordered as ms, of which 3 look like s: those"
    )
    with pytest.warns(UserWarning, match=message):
        found = read_interactions(write(text, "log.csv"), None, min_items=1)
    assert found.time_unit == "ms"


@pytest.mark.parametrize("times", [(0, 1_577_836_800_000), (5, 2**62), (86_400, 1_577_836_800)])
def test_few_times_near_1970_are_of_the_unit_of_the_others(write: Write, times: tuple[int, int]) -> None:
    path = write(f"user,item,timestamp\nu,b,{times[1]}\nu,a,{times[0]}\n", "log.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert named(read_interactions(path, None, min_items=1)) == {"u": ["a", "b"]}


def test_without_times_rows_are_in_file_order(write: Write) -> None:
    found = read_interactions(write("user,item\nu,b\nv,a\nu,a\n", "pairs.csv"), None, min_items=1)
    assert named(found) == {"u": ["b", "a"], "v": ["a"]}
    assert "in file order" in found.taken_for and found.times is None


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (
            "user,item,time\nu,a,1\nu,b,2020-01-01\n",
            "a.csv",
            r"line 3: expected a finite number as timestamp",
        ),
        ("user,item,time\nu,a,2020-13-01\n", "a.csv", r"line 2: .* got '2020-13-01', which is no ISO 8601"),
        ('{"user": "u", "item": "a"}\n{"user": \n', "a.jsonl", r"line 2: not valid JSON"),
        (
            '{"user": "u", "item": "a"}\n{"user": "u", "item": "a", "user": "v"}\n',
            "a.jsonl",
            r"line 2: not valid JSON \(the key 'user' twice in one object\)",
        ),
        (
            '{"user": "u", "item": ["a"], "time": 1}\n',
            "a.jsonl",
            r"line 1: expected one item's name, got \['a'\]",
        ),
        ('{"user": "u", "item": "a"}\n{"user": "v"}\n', "a.jsonl", r"line 2: the item's name is empty"),
        (gzip.compress(b"user,item\n", mtime=0)[:-9], "a.csv.gz", r"a\.csv\.gz is a damaged gzip file"),
    ],
)
def test_bad_contents_are_named(write: Write, content: str | bytes, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_interactions(write(content, name), None)


def test_without_pyarrow_the_error_says_what_to_install(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = (
        r"users: .*a\.parquet, a Parquet file, is read by pyarrow, .*pip install 'crossan-fast\[formats\]'"
    )
    with pytest.raises(ImportError, match=message):
        read_interactions(write(b"PAR1....PAR1", "a.parquet"), None)
    monkeypatch.undo()
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra `formats`")
    with pytest.raises(ValueError, match=r"a\.parquet is no sound Parquet file"):
        read_interactions(write(b"PAR1....PAR1", "a.parquet"), None)
    with pytest.raises(TypeError, match=r"expected a path, a pandas or polars DataFrame, .* got int"):
        read_interactions(3, None)


ITEM_FORMS = {
    "recbole": (
        "item_id:token\tmovie_title:token_seq\tyear:float\n1\tSnow, at last\t1999\n2\tA\t\n",
        "movie",
    ),
    "json": (
        '{"parent_asin": "1", "title": "Snow, at last", "year": 1999, "images": [{"large": "a"}]}\n'
        '{"title": "A", "year": null, "parent_asin": 2}\n',
        "parent_asin",
    ),
    "windows": ('\ufeffitemID;Name;Year\r\n1;"Snow, at last";1999\r\n2;A;\r\n', "itemid"),
}


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_items(write: Write, form: str) -> None:
    table = read_items(write(gzip.compress(ITEM_FORMS[form][0].encode()), "items.gz"))
    assert table.names == ["1", "2"]
    assert table.columns["title"] == ["Snow, at last", "A"] and table.columns["year"] == ["1999", None]
    assert "taken for" in table.taken_for and "gzipped" in table.taken_for
    with pytest.raises(
        ValueError, match=r"expected a column 'tilte' for titles, got .*; did you mean 'title'"
    ):
        read_items(write(ITEM_FORMS["json"][0]), columns={"title": "tilte"})


def test_items_that_pandas_wrote(tmp_path: Path) -> None:
    pandas = need_pandas()
    titles = ['1/4" NPT', "Snow, at last", '"quoted"', None, "plain"]
    frame = pandas.DataFrame({"item": range(5), "name": titles, "tags": [["a", "b"], [], None, ["c"], ["d"]]})
    for separator in (",", "\t", ";"):
        frame[["item", "name"]].to_csv(tmp_path / "items.csv", sep=separator, index=False)
        assert read_items(tmp_path / "items.csv").columns == {"title": titles}, separator
    for source in (frame, tmp_path / "items.parquet"):
        frame.to_parquet(tmp_path / "items.parquet")
        table = read_items(source)
        assert table.names == list("01234")
        assert table.columns == {"title": titles, "tags": ["a b", None, None, "c", "d"]}


def test_names_in_bytes_are_text(tmp_path: Path) -> None:
    need_pandas()
    import pyarrow

    def events(item: bytes, kind: Any = None) -> Any:
        columns = {"user": [b"u", b"u"], "item": pyarrow.array([b"b", item], kind), "time": [2, 1]}
        return pyarrow.table(columns)

    for kind in (
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
    ):
        from pyarrow import parquet

        parquet.write_table(events("é".encode(), kind), tmp_path / "events.parquet")
        found = read_interactions(tmp_path / "events.parquet", None, min_items=1)
        assert named(found) == {"u": ["é", "b"]}, kind
    with pytest.raises(ValueError, match=r"row 2: expected the item's name in UTF-8, got b'\\xe9'"):
        read_interactions(events(b"\xe9"), None)
    lists = pyarrow.table({"user": ["u", "v"], "items": [[b"a", b"b"], [b"c"]]})
    assert named(read_interactions(lists, None, min_items=1)) == {"u": ["a", "b"], "v": ["c"]}
    texts = pyarrow.table({"user": ["u"], "items": [b"a b"], "n": [1]}).select(["user", "items"])
    assert named(read_interactions(texts, None, min_items=1)) == {"u": ["a", "b"]}
    wrong = pyarrow.table({"user": ["u", "v"], "items": [[b"a"], [b"c", b"\xe9"]]})
    with pytest.raises(ValueError, match=r"row 2: expected items' names in UTF-8, got bytes that are not"):
        read_interactions(wrong, None)
    histories = wrong.append_column("item", pyarrow.array(["x", "y"]))
    with pytest.raises(ValueError, match=r"row 2: expected items' names in UTF-8, got bytes that are not"):
        read_interactions(histories, None)


def test_items_in_bytes_are_text_and_pictures_are_left_out() -> None:
    need_pandas()
    import pyarrow

    table = pyarrow.table({"item": [b"a", b"b"], "title": [b"A &amp; B", None], "png": [b"text", b"\x89PNG"]})
    with pytest.warns(UserWarning, match=r"items: .*: left out png: bytes that are no text in UTF-8"):
        found = read_items(table)
    assert found.names == ["a", "b"] and found.columns == {"title": ["A & B", None]}
    with pytest.raises(ValueError, match=r"row 1: expected the item's name in UTF-8, got b'\\xe9'"):
        read_items(pyarrow.table({"item": [b"\xe9"], "title": ["A"]}))


def test_times_stay_exact_in_every_form(write: Write) -> None:
    """Two times that differ in the lowest of 63 bits: as floats they would tie."""
    late = 2**63 - 1
    text = f"user,item,timestamp\nu,b,{late}\nu,a,{late - 1}\n"
    assert named(read_interactions(write(text, "a.csv"), None, min_items=1)) == {"u": ["a", "b"]}
    frame = pandas_frame()[:2].assign(user="u", item=["b", "a"], timestamp=np.array([late, late - 1]))
    assert named(read_interactions(frame, None, min_items=1)) == {"u": ["a", "b"]}


def test_what_pyarrow_splits_is_as_it_would_be_without(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long plain log: the same sequences, and the same complaint about the same line."""
    pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra `formats`")
    rng = random.Random(2)
    rows = [
        f"u{rng.randrange(400)}, i{rng.randrange(900):030} ,{rng.randrange(99)}\r\n" for _ in range(30_000)
    ]
    text = "user,item,timestamp\r\n" + "".join(rows)
    wrong = {
        "late": text + "u1,i1\r\n",
        "time": text.replace(",7\r\n", ",7x\r\n", 1),
        "name": text.replace(rows[20_000], ",a,1\r\n", 1),
    }
    found, said = [], []
    for threshold in (1 << 20, 1 << 40):
        monkeypatch.setattr("crossan_fast.data._delimited._WORTH_IT", threshold)
        found.append(read_interactions(write(text, "log.csv"), None, min_items=1))
        for content in wrong.values():
            with pytest.raises(ValueError) as error:
                read_interactions(write(content, "log.csv"), None)
            said.append(str(error.value))
    assert named(found[0]) == named(found[1]) and found[0].item_names == found[1].item_names
    assert np.array_equal(found[0].times, found[1].times)
    assert said[:3] == said[3:] and all("line" in message for message in said), said


def test_a_misspelt_column_is_no_table_without_a_header(write: Write) -> None:
    """Its header would be an item, or a user, and nobody would see it."""
    items = write("artikel,bezeichnung\na,A lamp\nb,A rug\n", "items.csv")
    with pytest.raises(
        ValueError, match=r"first line that names the columns, 'artikl' among them, .*'artikel'\?"
    ):
        read_items(items, columns={"item": "artikl"})
    with pytest.raises(ValueError, match=r"'zzz' among them, got artikel, bezeichnung$"):
        read_items(items, columns={"item": "zzz"})
    with pytest.raises(ValueError, match=r"expected a column of items' names, got artikel, bezeichnung \("):
        read_items(items, columns={"title": "bezeichnung"})
    assert read_items(items, columns={"item": "artikel"}).names == ["a", "b"]
    assert read_items(items, columns={"item": 1}).names == ["artikel", "a", "b"], "as it was asked for"
    users = write("buyer\tbasket\nanna\ta b c d e\n", "users.tsv")
    with pytest.raises(ValueError, match=r"'byer' among them, got buyer, basket; did you mean 'buyer'"):
        read_interactions(users, None, columns={"user": "byer"})
    with pytest.raises(
        ValueError, match=r"expected a column 'byer' for users, got buyer, basket; did you mean"
    ):
        read_interactions(users, None, columns={"user": "byer", "items": "basket"})
    plain = write("anna\ta b c d e\n", "plain.tsv")
    with pytest.warns(UserWarning, match=r"plain.tsv: .*'user_name' among them, .*; read without a header"):
        found = read_interactions(plain, None, columns={"user": "user_name"})
    assert named(found) == {"anna": list("abcde")}
    alike = write("user1\ta b c d e\nuser2\tb c d e f\n", "alike.tsv")
    with pytest.warns(UserWarning, match=r"alike.tsv: .*'user' among them, .*; read without a header"):
        found = read_interactions(alike, None, columns={"user": "user"})
    assert named(found) == {"user1": list("abcde"), "user2": list("bcdef")}
