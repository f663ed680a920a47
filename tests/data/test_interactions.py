"""Users files, judged against a plain per-user rendering of the same rules on random sequences."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossan_fast.data import (
    Catalogue,
    Dropped,
    Interactions,
    build_interactions,
    read_interactions,
    read_items,
)

Write = Callable[..., Path]


def named(interactions: Interactions) -> dict[str, list[str]]:
    """Sequences as item names, through the public mappings."""
    return {
        user: [interactions.name_of(row) for row in interactions.sequence(u).tolist()]
        for u, user in enumerate(interactions.user_names)
    }


def test_iisan_layout(write: Write) -> None:
    path = write("u1\tc a a\nu2\ta b\nu3\td c b a\n", "users.tsv")
    known = ["a", "b", "c", "x", "d"]
    found = read_interactions(path, known, min_items=3, max_items=3, catalogue="used")
    assert named(found) == {"u1": ["c", "a", "a"], "u3": ["c", "b", "a"]}
    assert found.item_names == ["", "a", "b", "c"]
    assert found.ids.tolist() == [3, 1, 1, 3, 2, 1]
    assert found.offsets.tolist() == [0, 3, 6]
    assert found.ids.dtype == found.offsets.dtype == np.int64
    assert found.dropped == Dropped(short_users=1, old_interactions=1, unused_items=2)
    assert str(found) == "2 users, 3 items, 6 interactions"
    assert "1 short users" in str(found.dropped)


def test_event_log_is_sorted_by_time_and_stable(write: Write) -> None:
    events = "user,item,timestamp\n9,b,20\n4,a,5\n9,a,10\n9,c,20\n4,c,4\n"
    events += "9,d,9223372036854775807\n9,e,9223372036854775806\n"
    found = read_interactions(write(events, "users.csv"), None, min_items=2, max_items=9)
    # The last two times differ in the lowest of 63 bits: as floats they would tie.
    assert named(found) == {"9": ["a", "b", "c", "e", "d"], "4": ["c", "a"]}


def test_event_log_columns_in_any_order_tabs_and_fractional_times(write: Write) -> None:
    events = "Timestamp\tuser_id\tnote\titem_id\n2.5\tu\t-\tb\n2.25\tu\t-\ta\n3\tu\t-\tc\n"
    found = read_interactions(write(events, "users.tsv"), None, min_items=3, max_items=3)
    assert named(found) == {"u": ["a", "b", "c"]}


def test_sequences_may_have_a_header(write: Write) -> None:
    path = write("user\titems\nu\ta b  c \n", "users.tsv")
    assert named(read_interactions(path, None, min_items=3)) == {"u": ["a", "b", "c"]}


def test_rows_are_those_of_a_cache_by_default() -> None:
    cache_names = ["", "z", "a", "b", "y"]
    found = build_interactions({"u": ["b", "a", "b"]}, cache_names, min_items=3)
    assert found.catalogue == Catalogue.of(cache_names[1:])
    assert found.item_names == cache_names
    assert found.ids.tolist() == [3, 2, 3]
    assert found.dropped.unused_items == 0


def test_unknown_items_are_counted_or_an_error_with_strict(write: Write) -> None:
    path = write("u1\ta q b q c\nu2\ta r b\n", "users.tsv")
    message = r"users: .*users\.tsv: 3 interactions with 2 items that the items file lacks, such as 'q', 'r'"
    with pytest.warns(UserWarning, match=message + "; dropped"):
        found = read_interactions(path, ["a", "b", "c"], min_items=3)
    assert named(found) == {"u1": ["a", "b", "c"]}
    assert found.dropped == Dropped(unknown_items=2, unknown_interactions=3, short_users=1)
    with pytest.raises(ValueError, match=message):
        read_interactions(path, ["a", "b", "c"], min_items=3, strict=True)


def test_rows_and_names_map_both_ways() -> None:
    found = build_interactions({"u": ["b", "a", "c"]}, min_items=3)
    assert [found.row_of(found.name_of(row)) for row in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(KeyError, match=r"item 'q' is not in the catalogue of 3 items"):
        found.row_of("q")
    with pytest.raises(KeyError, match=r"item '' is not in the catalogue"):
        found.row_of("")
    for row in (0, 4, -1):
        with pytest.raises(IndexError, match=rf"row: expected 1 to 3, got {row}"):
            found.name_of(row)
    for user in (-1, 1):
        with pytest.raises(IndexError, match=rf"user: expected 0 to 0, got {user}"):
            found.sequence(user)


names = st.sampled_from([f"i{k}" for k in range(12)])


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.dictionaries(
        st.text("uvw", min_size=1, max_size=4), st.lists(names, max_size=9), max_size=8
    ),
    known=st.lists(names, unique=True, max_size=12),
    min_items=st.integers(1, 4),
    max_items=st.integers(1, 8),
)
def test_equals_a_loop_over_users(
    sequences: dict[str, list[str]], known: list[str], min_items: int, max_items: int
) -> None:
    kept = {user: [n for n in seq if n in known] for user, seq in sequences.items()}
    expected = {user: seq[-max_items:] for user, seq in kept.items() if len(seq) >= min_items}
    used = [n for n in known if any(n in seq for seq in expected.values())]
    unknown = [n for seq in sequences.values() for n in seq if n not in known]
    if unknown:
        with pytest.warns(UserWarning, match="that the items file lacks"):
            found = _build(sequences, known, min_items, max_items)
    else:
        found = _build(sequences, known, min_items, max_items)
    if found is None:
        assert not expected
        return
    assert named(found) == expected
    assert found.item_names == ["", *used]
    assert found.dropped == Dropped(
        unknown_items=len(set(unknown)),
        unknown_interactions=len(unknown),
        short_users=len(sequences) - len(expected),
        old_interactions=sum(len(kept[user]) - len(seq) for user, seq in expected.items()),
        unused_items=len(known) - len(used),
    )


def _build(
    sequences: dict[str, list[str]], known: list[str], min_items: int, max_items: int
) -> Interactions | None:
    """None where the builder says that no user is left."""
    try:
        return build_interactions(
            sequences, known, min_items=min_items, max_items=max_items, catalogue="used"
        )
    except ValueError as error:
        assert "known items" in str(error)
        return None


def test_both_layouts_of_the_same_users_agree(write: Write) -> None:
    rng = random.Random(3)
    sequences = {f"u{u}": [f"i{rng.randrange(30)}" for _ in range(rng.randrange(1, 20))] for u in range(50)}
    lines = "".join(f"{user}\t{' '.join(seq)}\n" for user, seq in sequences.items())
    events = [f"{u},{n},{t}" for u, seq in sequences.items() for t, n in enumerate(seq)]
    rng.shuffle(events)
    log = "user,item,timestamp\n" + "\n".join(events) + "\n"
    items = [f"i{k}" for k in range(30)]
    a = read_interactions(write(lines, "users.tsv"), items)
    b = read_interactions(write(log, "users.csv"), items)
    assert named(a) == named(b) == named(build_interactions(sequences, items))
    assert a.item_names == b.item_names
    assert a.dropped == b.dropped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("u\ta b\nv\tb c\nu\tc d\n", r"line 3: user 'u' is already on line 1"),
        ("\ta b\n", r"line 1: the user's name is empty"),
        (b"u\ta b\n\nv\tb \xff\n", r"line 3: byte 0xff is not UTF-8"),
        ("", r"users: .*users\.tsv is empty"),
        ("u\ta b\nv\n", r"line 2: expected 2 tab-separated columns, got 1"),
        ("u\ta b\nv\ta\tb\n", r"line 2: expected 2 tab-separated columns, got 3"),
        (
            "1,2,3\n",
            r"expected `user<TAB>item item item \.\.\.` or a header .* got 3 comma-separated columns without",
        ),
        ("user,item,when\n1,2,3\n", r"columns user, item, timestamp; got 3 .* named user, item, when"),
        (
            "user,thing,timestamp\n1,2,3\n",
            r"columns user, item, timestamp; got .* named user, thing, timestamp",
        ),
        ("user,item,timestamp\n1,2,soon\n", r"line 2: expected a finite number as timestamp, got 'soon'"),
        (
            "user,item,timestamp\n1,2,3\n1,2,nan\n",
            r"line 3: expected a finite number as timestamp, got 'nan'",
        ),
        ("user,item,timestamp\n1,,3\n", r"line 2: the item's name is empty"),
        ("user,item,timestamp\n,1,3\n", r"line 2: the user's name is empty"),
        ("user,item,timestamp\n1,2\n", r"line 2: expected 3 comma-separated columns, got 2"),
        ("user,item,timestamp\n", r"none of 0 users has min_items = 5 known items \(the longest has 0\)"),
        ("u\ta b\nv\ta b c\n", r"none of 2 users has min_items = 5 known items \(the longest has 3\)"),
    ],
)
def test_bad_files_are_named_with_their_line(write: Write, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_interactions(write(content, "users.tsv"), None)


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"users: no such file: .*nowhere\.tsv"):
        read_interactions(tmp_path / "nowhere.tsv", None)


def test_bad_arguments() -> None:
    sequences = {"u": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=r"items: 'a' occurs more than once among 3 names"):
        build_interactions(sequences, ["a", "b", "a"])
    with pytest.raises(ValueError, match=r"^min_items: expected an integer of at least 1, got 0"):
        build_interactions(sequences, min_items=0)
    with pytest.raises(ValueError, match=r"^max_items: expected an integer of at least 1, got -4"):
        build_interactions(sequences, max_items=-4)
    with pytest.raises(ValueError, match=r"catalogue: expected 'all' or 'used', got 'some'"):
        build_interactions(sequences, catalogue="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item_names", "ids", "offsets", "message"),
    [
        (["a", "b"], [1], [0, 1], r"item_names: expected '' \(padding\) at row 0"),
        (["", "a", "a"], [1], [0, 1], r"item_names: expected distinct names"),
        (["", "a"], [1], [0, 2], r"offsets: expected 2 places that rise from 0 to 1"),
        (["", "a"], [1], [0, 1, 1], r"offsets: expected 2 places"),
        (["", "a"], [0], [0, 1], r"ids: expected rows from 1 to 1, got 0 to 0"),
        (["", "a"], [2], [0, 1], r"ids: expected rows from 1 to 1, got 2 to 2"),
    ],
)
def test_interactions_check_what_they_are_made_of(
    item_names: list[str], ids: list[int], offsets: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Interactions(["u"], item_names, np.array(ids), np.array(offsets))


def test_scientific_has_the_counts_of_iisan(scientific: Path) -> None:
    items = read_items(scientific / "items.tsv")
    found = read_interactions(scientific / "users.tsv", items.names, max_items=13, catalogue="used")
    assert (found.num_users, found.num_items, found.ids.size) == (12076, 20314, 81711)
    assert found.dropped == Dropped(old_interactions=3500, unused_items=511)
    order = [items.index_of(name) for name in found.item_names[1:]]
    assert order == sorted(order)


@pytest.mark.parametrize("names", ["xyz", b"xyz", ""])
def test_a_string_in_place_of_a_list_of_names_is_refused(names):
    with pytest.raises(ValueError, match=r"sequences\['b'\]: expected a list of item names, got b?'"):
        build_interactions({"a": ["x", "y", "z"], "b": names}, min_items=3)
    with pytest.raises(TypeError, match="items: expected a list of item names, got 'xyz'"):
        build_interactions({"a": ["x", "y", "z"]}, "xyz", min_items=3)


def test_numbers_of_items_are_checked():
    for name in ("min_items", "max_items"):
        with pytest.raises(TypeError, match=f"{name}: expected an integer of at least 1, got .*2.5"):
            build_interactions({"a": ["x", "y", "z"]}, **{name: 2.5})
        with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 0"):
            build_interactions({"a": ["x", "y", "z"]}, **{name: 0})
    with pytest.raises(TypeError, match="sequences: expected item names by user, got list"):
        build_interactions([["x", "y", "z"]])
    found = build_interactions({"a": list("uvwxy"), "b": list("xyz")}, min_items=4, max_items=2)
    assert named(found) == {"a": ["x", "y"]}
