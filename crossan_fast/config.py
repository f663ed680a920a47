"""What a model is: the modalities it reads and every choice the papers leave open.

Fields marked ◊ are this project's own reading of CROSSAN (arXiv 2504.10307), whose method section is not
public; IISAN's (arXiv 2404.02059) values come from its public code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from crossan_fast._checks import nearest
from crossan_fast._suggest import suggesting
from crossan_fast._untrusted import parse_json

Architecture = Literal["crossan", "iisan"]
Cross = Literal["backbone", "side", "none"]
CrossProjection = Literal["identity", "low_rank"]
DropoutScope = Literal["item", "history"]
IdFusion = Literal["expert", "sum"]
Activation = Literal["gelu", "relu"]
Head = Literal["one", "two"]
Fusion = Literal["momef", "concat"]
Loss = Literal["in_batch", "full", "sampled"]
Targets = Literal["all", "last"]
NegativeSampling = Literal["uniform", "popularity"]
Scores = Literal["dot", "cosine"]
Attention = Literal["sdpa", "xformers"]

_IISAN: dict[str, Any] = {
    "architecture": "iisan",
    "cross": "none",
    "activation": "relu",
    "head": "two",
    "fusion": "concat",
}

# What transformers' Trainer sets on the config of whatever model it is given. None of it is a field:
# equality, hash, `repr` and JSON do not know it, and nothing here reads it.
_FOREIGN = ("use_cache",)

_Class = TypeVar("_Class")

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@suggesting
@dataclass(frozen=True)
class Modality:
    """One frozen encoder as the cache holds it.

    Attributes:
        name: letters, digits, `_` and `-`; the key in `states` and in the state dict.
        width: D_m, the encoder's hidden width.
        levels: L, how many pooled states of it are kept; the same for every modality of a model.
        frame: of a centred cache's modality, a digest of what was taken away, so that a model of its states
            reads no others; empty: states as their encoder gave them, or coordinates of these in a basis.
    """

    name: str
    width: int
    levels: int
    frame: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.frame, str):
            raise ValueError(f"Modality.frame: expected a digest as text, got {self.frame!r}")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(f"Modality.name: expected letters, digits, '_' or '-', got {self.name!r}")
        _at_least("Modality.width", self.width, 1)
        _at_least("Modality.levels", self.levels, 1)


@dataclass(frozen=True)
class TowerSpec:
    """One side-network tower: the modality it adapts, or the pair of modalities it joins (IISAN).

    Attributes:
        name: `text`, or `image+text` for a pair.
        sources: indices into `CrossanConfig.modalities`; one, or two for a pair.
        width: D of the tower: its modality's, or the narrower of a pair's.
    """

    name: str
    sources: tuple[int, ...]
    width: int


def _with_foreign_attributes(cls: type[_Class]) -> type[_Class]:
    """Let `_FOREIGN` be set on instances of a frozen dataclass; all else stays refused."""
    refuse = cls.__setattr__

    def set_attribute(self: Any, name: str, value: object) -> None:
        if name in _FOREIGN:
            object.__setattr__(self, name, value)
        else:
            refuse(self, name, value)

    cls.__setattr__ = set_attribute  # type: ignore[method-assign]
    return cls


@_with_foreign_attributes
@suggesting
@dataclass(frozen=True)
class CrossanConfig:
    """A validated, immutable description of a `CrossanModel`; round-trips through JSON.

    Attributes:
        modalities: the frozen encoders, in the order used everywhere (`present`, router, concatenation).
        embedding_dim: d, width of item and user embeddings.
        bottleneck: r, rank of the side adapters.
        architecture: `crossan`, or `iisan` (intra towers plus one inter tower for each pair).
        cross: ◊ where a tower's cross terms come from: the other `backbone`s' states of the same level,
            the other `side` towers' outputs of the level before, or `none`.
        cross_projection: ◊ T, what brings a cross term to its tower: the `identity` where widths agree and a
            pair of matrices of rank r elsewhere, or `low_rank`, such a pair everywhere.
        activation: of the adapters; `gelu` is the exact (erf) form.
        gate_temperature: τ in `sigmoid(θ / τ)`.
        head: ◊ `one` Linear D→d, or `two`, D→D then D→d with nothing between (IISAN's code).
        fusion: ◊ `momef` (router over modality experts), or `concat` (IISAN).
        top_k: ◊ experts per item, renormalised; None runs every present expert.
        load_balance: ◊ weight of the Switch Transformers load-balance loss (arXiv 2101.03961, eq. 4).
        expert_expansion: ◊ hidden width of an expert over d.
        id_embedding: ◊ a vector for each item beside its modalities, allocated by
            `CrossanModel.set_popularity`; items that training never saw do without.
        id_fusion: ◊ how that vector joins: as one more `expert` of the fusion, or as a `sum`, added to what
            the fusion makes, from zero on. The sum did no worse wherever both were tried, and far better
            where items are seen rarely (docs/which-setting.md).
        modality_dropout: ◊ probability that a present modality is dropped in training, never an item's last.
        modality_dropout_scope: ◊ an `item` and step, or a whole `history` (Sequential Modality Dropout,
            arXiv 2608.10240): one draw a history and modality; targets and negatives keep what they have.
        window: S, history length.
        blocks: SASRec blocks.
        attention_heads: heads of each block; divides `embedding_dim`.
        dropout: of the sequence encoder.
        attention: `sdpa`, or `xformers` (packed sequences, CUDA only).
        loss: `in_batch`, `full` or `sampled`: against places of the batch, the catalogue, or draws from it.
        targets: ◊ `all` items of a row behind its first, each predicted from those before it, or the `last`.
        negatives: N, items that `sampled` draws a step, with replacement, for all its rows.
        negative_sampling: `uniform`, or by `popularity`, which is taken off the logits as in batch.
        scores: ◊ `dot`, or `cosine`: items are unit vectors wherever they appear, users unit vectors.
        temperature: ◊ scores are divided by it, in training and after; `cosine` wants some 0.05 to 0.2.
        label_smoothing: ε: the target's share of a loss's labels is 1 − ε, all of a row's columns share ε.
        deduplicate: run side network, fusion and loss on the batch's distinct ids; exact either way.
        adapter_std: standard deviation of the adapters' initial weights.
    """

    modalities: tuple[Modality, ...]
    embedding_dim: int = 64
    bottleneck: int = 64
    architecture: Architecture = "crossan"
    cross: Cross = "backbone"
    cross_projection: CrossProjection = "identity"
    activation: Activation = "gelu"
    gate_temperature: float = 0.1
    head: Head = "one"
    fusion: Fusion = "momef"
    top_k: int | None = None
    load_balance: float = 0.0
    expert_expansion: int = 4
    id_embedding: bool = False
    id_fusion: IdFusion = "expert"
    modality_dropout: float = 0.0
    modality_dropout_scope: DropoutScope = "item"
    window: int = 10
    blocks: int = 2
    attention_heads: int = 2
    dropout: float = 0.1
    attention: Attention = "sdpa"
    loss: Loss = "in_batch"
    targets: Targets = "all"
    negatives: int = 1024
    negative_sampling: NegativeSampling = "uniform"
    scores: Scores = "dot"
    temperature: float = 1.0
    label_smoothing: float = 0.0
    deduplicate: bool = True
    adapter_std: float = 0.01
    # Derived, so that every consumer agrees on the order of towers.
    towers: tuple[TowerSpec, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.modalities, (str, bytes)) or not isinstance(self.modalities, Sequence):
            raise TypeError(
                f"modalities: expected a sequence of Modality, got {type(self.modalities).__name__}"
            )
        object.__setattr__(self, "modalities", tuple(_as_modality(m) for m in self.modalities))
        self._check_modalities()
        self._check_fields()
        self._check_combinations()
        object.__setattr__(self, "towers", self._towers())

    @classmethod
    def iisan(cls, modalities: Sequence[Modality], **overrides: Any) -> CrossanConfig:
        """The ancestor: ReLU adapters, no cross terms, two-layer heads, concatenation."""
        return cls.from_dict({"modalities": tuple(modalities), **_IISAN, **overrides})

    @classmethod
    def defaults(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Every field but `modalities` with its default; IISAN's where `values` has that architecture."""
        plain = {f.name: f.default for f in fields(cls) if f.init and f.name != "modalities"}
        return {**plain, **_IISAN} if values.get("architecture") == "iisan" else plain

    @property
    def num_levels(self) -> int:
        return self.modalities[0].levels

    @property
    def modality_names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.modalities)

    @property
    def experts(self) -> tuple[str, ...]:
        """What MOMEF weighs, by name: the modalities, and `id` behind them where ids are an expert."""
        return (*self.modality_names, "id") if self.id_expert else self.modality_names

    @property
    def id_expert(self) -> bool:
        """Whether items' own vectors are one more expert of the fusion."""
        return self.id_embedding and self.id_fusion == "expert"

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        plain["modalities"] = [
            {key: value for key, value in asdict(m).items() if key != "frame" or value}
            for m in self.modalities
        ]
        return plain

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_json_string(self) -> str:
        """`to_json`, by the name that the loggers of transformers' Trainer call."""
        return self.to_json()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CrossanConfig:
        """Build from plain values; an unknown key is an error that names the nearest known one."""
        known = {f.name for f in fields(cls) if f.init}
        for key in values:
            if key not in known:
                raise ValueError(f"unknown config key {key!r}{nearest(key, known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> CrossanConfig:
        values = parse_json(text, "config")
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def _check_modalities(self) -> None:
        if not self.modalities:
            raise ValueError("modalities: expected at least one Modality, got none")
        names = [m.name for m in self.modalities]
        if repeated := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"modalities: names must be distinct, {repeated} occur more than once")
        levels = {m.name: m.levels for m in self.modalities}
        if len(set(levels.values())) > 1:
            raise ValueError(f"modalities: every modality needs the same number of levels, got {levels}")

    def _check_fields(self) -> None:
        """Each field by itself."""
        for name, options in (
            ("architecture", Architecture),
            ("cross", Cross),
            ("cross_projection", CrossProjection),
            ("id_fusion", IdFusion),
            ("modality_dropout_scope", DropoutScope),
            ("activation", Activation),
            ("head", Head),
            ("fusion", Fusion),
            ("attention", Attention),
            ("loss", Loss),
            ("targets", Targets),
            ("negative_sampling", NegativeSampling),
            ("scores", Scores),
        ):
            value = getattr(self, name)
            if value not in get_args(options):
                raise ValueError(f"{name}: expected one of {list(get_args(options))}, got {value!r}")
        for name in (
            "embedding_dim",
            "bottleneck",
            "expert_expansion",
            "window",
            "blocks",
            "attention_heads",
            "negatives",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("dropout", "modality_dropout", "label_smoothing"):
            value = _number(name, getattr(self, name))
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {value!r}")
        if _number("load_balance", self.load_balance) < 0:
            raise ValueError(f"load_balance: expected a weight of at least 0, got {self.load_balance!r}")
        for name in ("gate_temperature", "temperature", "adapter_std"):
            if not _number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        for name in ("deduplicate", "id_embedding"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected true or false, got {getattr(self, name)!r}")

    def _check_combinations(self) -> None:
        """Fields that ask something of each other."""
        if self.embedding_dim % self.attention_heads:
            raise ValueError(
                f"attention_heads: expected a divisor of embedding_dim={self.embedding_dim}, "
                f"got {self.attention_heads}"
            )
        if self.top_k is not None:
            _at_least("top_k", self.top_k, 1)
            if self.top_k > len(self.experts):
                counted = "modalities and ids" if self.id_expert else "modalities"
                raise ValueError(
                    f"top_k: expected at most the number of {counted}, {len(self.experts)}, got {self.top_k}"
                )
        if self.id_fusion != "expert" and not self.id_embedding:
            raise ValueError(f"id_fusion: {self.id_fusion!r} goes with id_embedding=true, got false")
        if self.id_expert and "id" in self.modality_names:
            raise ValueError("id_embedding: its expert is named 'id', as is one of the modalities")
        if self.architecture == "iisan" and self.cross != "none":
            raise ValueError(
                f"cross: architecture='iisan' has no cross terms, expected 'none', got {self.cross!r}"
            )
        if self.modality_dropout_scope == "history" and not self.deduplicate:
            raise ValueError(
                "modality_dropout_scope: 'history' works on distinct items and what they have left, expected "
                "deduplicate=true, got false"
            )
        if self.label_smoothing and not self.deduplicate:
            raise ValueError("label_smoothing: works on distinct items, expected deduplicate=true, got false")
        if self.loss == "sampled" and not self.deduplicate:
            raise ValueError("loss: 'sampled' works on distinct items, expected deduplicate=true, got false")
        if self.loss != "sampled":
            for name, default in (("negatives", 1024), ("negative_sampling", "uniform")):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name}: loss={self.loss!r} draws none, expected loss='sampled' or the default "
                        f"{default!r}, got {value!r}"
                    )
        if self.cross == "none" and self.cross_projection != "identity":
            raise ValueError(
                f"cross_projection: cross='none' has no cross terms to project, expected 'identity', "
                f"got {self.cross_projection!r}"
            )
        if self.fusion == "concat" and (self.top_k is not None or self.load_balance):
            raise ValueError("fusion: top_k and load_balance belong to fusion='momef', got fusion='concat'")
        if self.architecture == "iisan" and self.fusion == "momef":
            raise ValueError("fusion: architecture='iisan' fuses by 'concat', got 'momef'")

    def _towers(self) -> tuple[TowerSpec, ...]:
        towers = [TowerSpec(m.name, (i,), m.width) for i, m in enumerate(self.modalities)]
        if self.architecture == "iisan":
            for a, first in enumerate(self.modalities):
                for b, second in enumerate(self.modalities[a + 1 :], start=a + 1):
                    width = min(first.width, second.width)
                    towers.append(TowerSpec(f"{first.name}+{second.name}", (a, b), width))
        return tuple(towers)


def _as_modality(value: object) -> Modality:
    if isinstance(value, Modality):
        return value
    if isinstance(value, Mapping):
        known = {f.name for f in fields(Modality)}
        for key in value:
            if key not in known:
                raise ValueError(f"unknown modality key {key!r}{nearest(str(key), known)}")
        if missing := known - {"frame"} - set(value):
            raise ValueError(f"modality: missing {sorted(missing)}, got {dict(value)!r}")
        return Modality(**value)
    raise TypeError(f"modalities: expected Modality or a mapping of its fields, got {value!r}")


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")
    if value >= 2**31:  # no weight has a side as long; of a damaged file, torch's refusal names nothing
        raise ValueError(f"{name}: expected less than 2^31, got {value}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float can hold, got more") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return number
