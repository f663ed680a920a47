"""What a modality of a cache is built from, as users write it: `text=PATH:pool=mean:levels=7`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from crossan_fast._checks import nearest
from crossan_fast._suggest import suggesting
from crossan_fast.cache.levels import Pooling

DEFAULT_COLUMNS = {"text": "title", "image": "image_path", "video": "video_path", "audio": "audio_path"}

_OPTIONS = ("pool", "levels", "column", "kind", "max_length", "lowercase", "precomputed", "ids")


@suggesting
@dataclass(frozen=True)
class ModalitySpec:
    """One modality to build.

    Attributes:
        name: of the modality in the cache and in models.
        source: an encoder (a folder, or a name on the hub); with `precomputed` a file or a folder
            of states, see `crossan_fast.cache.build.features`.
        pool: `mean` (default) or `cls`, see `crossan_fast.cache.levels.pool`.
        levels: how many evenly spaced states to keep (default 7), or which ones; of precomputed states, all.
        column: of the items file; default `title`, `image_path`, `video_path` or `audio_path`, by what the
            encoder reads.
        kind: `text`, `image`, `video` or `audio`, where the encoder leaves it open (CLIP).
        max_length, lowercase: of texts; default: `build_cache`'s.
        precomputed: `source` holds floats `[L, D]` or `[D]` an item: by name, or in the items file's order.
        ids: with `precomputed`, a file that says which item each row of `source` is.
    """

    name: str
    source: str
    pool: Pooling = "mean"
    levels: int | tuple[int, ...] | None = None
    column: str | None = None
    kind: Any = None
    max_length: int | None = None
    lowercase: bool | None = None
    precomputed: bool = False
    ids: str | None = None

    def __post_init__(self) -> None:
        if self.ids is not None and not self.precomputed:
            raise ValueError(
                f"modality {self.name!r}: ids: expected with precomputed alone, got {self.ids!r}"
            )
        if self.pool not in get_args(Pooling):
            raise ValueError(
                f"modality {self.name!r}: pool: expected one of {get_args(Pooling)}, got {self.pool!r}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(
                f"modality {self.name!r}: max_length: expected at least 1, got {self.max_length}"
            )

    @classmethod
    def parse(cls, text: str) -> ModalitySpec:
        """Read `NAME=SOURCE[:option=value]…`; `levels=7` are seven evenly spaced states, `levels=0,2,4`
        these.

        Options: pool, levels, column, kind, max_length, ids, and the flags lowercase and precomputed.

        Raises:
            ValueError: naming the modality, and the nearest option to an unknown one.
        """
        name, equals, rest = text.partition("=")
        if not equals or not name or not rest:
            raise ValueError(f"modality: expected NAME=SOURCE[:option=value]..., got {text!r}")
        source, *options = rest.split(":")
        if len(source) == 1 and options and options[0][:1] in ("\\", "/"):  # a Windows drive
            source = f"{source}:{options.pop(0)}"
        given: dict[str, Any] = {}
        for option in options:
            key, has_value, value = option.partition("=")
            if key not in _OPTIONS:
                raise ValueError(
                    f"modality {name!r}: expected options {', '.join(_OPTIONS)}, got {option!r}"
                    f"{nearest(key, _OPTIONS)}"
                )
            if key in given:
                raise ValueError(f"modality {name!r}: option {key!r} is given twice")
            given[key] = _value(name, key, value if has_value else None)
        return cls(name, source, **given)


def _value(name: str, key: str, value: str | None) -> Any:
    if key in ("lowercase", "precomputed"):
        if value not in (None, "true", "false"):
            raise ValueError(f"modality {name!r}: {key}: expected true or false, got {value!r}")
        return value != "false"
    if not value:
        raise ValueError(f"modality {name!r}: option {key!r} needs a value: {key}=...")
    if key not in ("levels", "max_length"):
        return value
    try:
        if key == "levels" and "," in value:
            return tuple(int(part) for part in value.split(",") if part)
        return int(value)
    except ValueError:
        wanted = "a number, or numbers with commas" if key == "levels" else "a number"
        raise ValueError(f"modality {name!r}: {key}: expected {wanted}, got {value!r}") from None
