"""Modalities as they are written on the command line."""

from __future__ import annotations

import pytest

from crossan_fast.cache import ModalitySpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("text=a/b", ModalitySpec("text", "a/b")),
        ("text=a:pool=cls:levels=7", ModalitySpec("text", "a", pool="cls", levels=7)),
        ("i=a:levels=0,2,4:column=pic", ModalitySpec("i", "a", levels=(0, 2, 4), column="pic")),
        ("i=a:levels=12,", ModalitySpec("i", "a", levels=(12,))),
        (
            "t=a:lowercase:max_length=12:kind=text",
            ModalitySpec("t", "a", lowercase=True, max_length=12, kind="text"),
        ),
        ("t=a:lowercase=false", ModalitySpec("t", "a", lowercase=False)),
        ("x=s.npy:precomputed", ModalitySpec("x", "s.npy", precomputed=True)),
        ("x=s.npy:precomputed:ids=i.txt", ModalitySpec("x", "s.npy", precomputed=True, ids="i.txt")),
        ("x=C:\\models\\bert:pool=cls", ModalitySpec("x", "C:\\models\\bert", pool="cls")),
    ],
)
def test_parse(text: str, spec: ModalitySpec) -> None:
    assert ModalitySpec.parse(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bert", r"modality: expected NAME=SOURCE\[:option=value\]..., got 'bert'"),
        ("=bert", "modality: expected NAME=SOURCE"),
        ("text=", "modality: expected NAME=SOURCE"),
        ("text=a:pol=cls", r"modality 'text': expected options pool, .* got 'pol=cls'; did you mean 'pool'"),
        ("text=a:pool=max", r"modality 'text': pool: expected one of \('cls', 'mean'\), got 'max'"),
        (
            "text=a:levels=seven",
            "modality 'text': levels: expected a number, or numbers with commas, got 'seven'",
        ),
        ("text=a:max_length=x", "modality 'text': max_length: expected a number, got 'x'"),
        ("text=a:max_length=0", "modality 'text': max_length: expected at least 1, got 0"),
        ("text=a:column", "modality 'text': option 'column' needs a value"),
        ("x=s.npy:precomputed:ids", "modality 'x': option 'ids' needs a value: ids=..."),
        ("x=s.npy:ids=i.txt", "modality 'x': ids: expected with precomputed alone, got 'i.txt'"),
        ("text=a:lowercase=yes", "modality 'text': lowercase: expected true or false, got 'yes'"),
        ("text=a:pool=cls:pool=mean", "modality 'text': option 'pool' is given twice"),
    ],
)
def test_what_cannot_be_parsed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalitySpec.parse(text)
