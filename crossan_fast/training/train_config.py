"""What a training run is: a YAML file, any field of which can be overridden as `key=value`.

    cache: caches/scientific
    users: ${data}/scientific/users.tsv
    run: runs/scientific
    epochs: 32
    model: {dropout: 0.2, loss: in_batch}
    optimizer: {learning_rate: 2e-3}

`${data}` in a path stands for the setting `data`, or for the environment variable CROSSAN_FAST_DATA.
"""

from __future__ import annotations

import datetime
import math
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin

from crossan_fast._checks import cutoffs_of, nearest
from crossan_fast._suggest import suggesting
from crossan_fast._untrusted import parse_yaml, read_settings
from crossan_fast.cache import HiddenStateCache
from crossan_fast.cache.opening import Verify
from crossan_fast.config import CrossanConfig, Modality
from crossan_fast.data.columns import ITEMS_ROLES, USERS_ROLES, Columns
from crossan_fast.training.keys import nearest_of_all
from crossan_fast.training.overrides import laid_over

DATA_VARIABLE = "CROSSAN_FAST_DATA"

FilterHistory = Literal["all", "all_except_target", "none"]
Candidates = Literal["used", "all"]
ComputePrecision = Literal["fp32", "tf32", "bf16"]
Precision = Literal["auto", ComputePrecision]
SplitKind = Literal["leave_one_out", "time", "ratio", "given"]


@suggesting
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) in three parameter groups.

    Attributes:
        learning_rate: after the warm-up.
        side_network, fusion, sequence_encoder: factors on `learning_rate` for the towers, for heads and
            fusion, and for the sequence encoder.
        weight_decay: decoupled; of matrices alone: biases, gates, norms and positions have none.
        id_weight_decay: ◊ the same of vectors that items have of their own (`model.id_embedding`, `SasRec`),
            free parameters that else learn the training data by heart. Adam holds their numbers to about
            1 / id_weight_decay at most, those of rare items to less; None: `weight_decay`.
        betas, eps: Adam's.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        clip_norm: bound on the norm of all gradients together; None: no bound.
        average: decay of an exponential moving average of the weights, which is what is evaluated and kept
            as the best; None: the weights themselves. See `crossan_fast.training.averaging`.
        skip_nonfinite: how many steps of a run may be left out, weights and optimizer as they were, because
            their loss or gradient is NaN or inf; one more stops the run. 0: the first one does. The log and
            `results.json` count them.
    """

    learning_rate: float = 1e-3
    side_network: float = 1.0
    fusion: float = 1.0
    sequence_encoder: float = 1.0
    weight_decay: float = 0.0
    id_weight_decay: float | None = 5.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0
    clip_norm: float | None = 5.0
    average: float | None = None
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        _fit_fields(self, "optimizer.", but="betas")
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            _check(0 < value < math.inf, f"optimizer.{name}", "a positive number", value)
        factors = ("side_network", "fusion", "sequence_encoder")
        for name in (*factors, "weight_decay", "warmup_steps", "skip_nonfinite"):
            value = getattr(self, name)
            _check(0 <= value < math.inf, f"optimizer.{name}", "at least 0 and finite", value)
        if self.id_weight_decay is not None:
            right = 0 <= self.id_weight_decay < math.inf
            _check(right, "optimizer.id_weight_decay", "at least 0 and finite, or null", self.id_weight_decay)
        betas = self.betas if isinstance(self.betas, (tuple, list)) else ()
        right = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        _check(right, "optimizer.betas", "two numbers in [0, 1)", self.betas)
        if self.clip_norm is not None:
            right = 0 < self.clip_norm < math.inf
            _check(right, "optimizer.clip_norm", "a positive number or null", self.clip_norm)
        if self.average is not None:
            _check(0 < self.average < 1, "optimizer.average", "a number in (0, 1) or null", self.average)


@suggesting
@dataclass(frozen=True)
class SplitConfig:
    """How users' interactions become training, validation and test; see `crossan_fast.data.splits`.

    Attributes:
        by: `leave_one_out`; `time`, at two moments for all users; `ratio`, shares of each user's items; or
            `given`, a split that comes with the data: a column of labels, or files.
        validation, test: of `time` the moments from which on interactions validate and test, ISO 8601 or
            numbers as the file's; of `ratio` shares, 0.1 each where they are left out; of `given` the files,
            where they are not the users file's own siblings (X.train.inter, X.valid.inter, X.test.inter).
        stride: 1 to the window: train on a window every so many items of a history, whose `max_items` None
            then keeps whole; `prefixes`: on one that ends at each item but the first, which `model.targets:
            last` counts once each; None: on each user's last window.
    """

    by: SplitKind = "leave_one_out"
    validation: float | str | None = None
    test: float | str | None = None
    stride: int | str | None = None

    def __post_init__(self) -> None:
        _fit_fields(self, "split.")
        given = [value for value in (self.validation, self.test) if value is not None]
        if self.by == "ratio":
            object.__setattr__(self, "validation", 0.1 if self.validation is None else self.validation)
            object.__setattr__(self, "test", 0.1 if self.test is None else self.test)
            for name in ("validation", "test"):
                value = getattr(self, name)
                _check(not isinstance(value, str), f"split.{name}", "a share, with split.by ratio", value)
        elif self.by == "time":
            _check(len(given) == 2, "split.validation, split.test", "two moments, with split.by time", given)
        elif self.by == "given":
            names = [value for value in given if isinstance(value, str)]
            _check(len(names) in (0, 2), "split.validation, split.test", "two files, or none", given)
        else:
            _check(not given, "split.validation, split.test", "neither, with split.by leave_one_out", given)
        right = self.stride in (None, "prefixes") or (type(self.stride) is int and self.stride >= 1)
        _check(right, "split.stride", "at least 1, prefixes or null", self.stride)


@suggesting
@dataclass(frozen=True)
class EvaluationConfig:
    """Full ranking; see `crossan_fast.training.evaluation`.

    Attributes:
        k: cut-offs of HR and NDCG; 10 is added where it is missing, since NDCG@10 picks the best epoch. What
            is not below the number of candidates becomes the largest that is, with a warning.
        filter_history: `all` (IISAN's protocol), `all_except_target` or `none`.
        candidates: rank the items that the users file names (`used`, as IISAN does), or `all` that the cache
            held when the run began.
        batch_size: users ranked at once.
        users: a users file for evaluation alone: its users' last item tests and the one before validates,
            and those of `TrainConfig.users` train whole. Users who are in both are left out and counted.
    """

    k: tuple[int, ...] = (5, 10, 20)
    filter_history: FilterHistory = "all_except_target"
    candidates: Candidates = "used"
    batch_size: int = 1024
    users: str | None = None

    def __post_init__(self) -> None:
        _fit_fields(self, "evaluation.", but="k")
        k = cutoffs_of("evaluation.k", self.k)
        _check(len(k) > 0 and min(k) >= 1, "evaluation.k", "integers of at least 1", k)
        object.__setattr__(self, "k", tuple(sorted({*k, 10})))
        _check(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@suggesting
@dataclass(frozen=True)
class TrainConfig:
    """One training run, resolved and checked; made by `load_config` or `TrainConfig.from_dict`.

    Attributes:
        cache: folder of the hidden-state cache; its rows are the catalogue.
        users: users file, see `crossan_fast.data.read_interactions`.
        run: the run's folder.
        items: items file for titles in recommendations; None: names alone.
        data: what `${data}` in `cache`, `users`, `run` and other paths stands for; None: CROSSAN_FAST_DATA.
        modalities: names of the cache's modalities to use, in this order; None: all.
        init_from: folder of a run whose best weights this one starts from: those of its best epoch so far,
            where it has not ended. Modalities that it lacks are added as by `CrossanModel.extend`, those that
            the config lacks are removed; what else the config says of weights has to be as it was there.
        freeze: with `init_from`, modalities whose towers and heads stay as they are; None: those that were
            there, where others are added.
        model: fields of `CrossanConfig` but `modalities`; `architecture: iisan` brings IISAN's defaults. What
            is left out is filled in, so that two configs of one model are equal.
        split, optimizer, evaluation: see there.
        columns: of the users file, by role (`user`, `item`, `items`, `time`, `rating`, `label`), where their
            names are none of the usual ones; see `crossan_fast.data.read_interactions`.
        item_columns: of the items file: `item` and `title`.
        min_rating: interactions rated lower are left out; None: none is.
        min_items, max_items, strict: of `read_interactions`; max_items None: the window, the item that the
            last prefix of the window predicts in training counted in it, and both held-out targets.
        batch_size: users a step.
        epochs: at most so many.
        patience: evaluations without a better validation NDCG@10 before training stops; None: never.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        seed: of weights, batches and dropout.
        verify: when the cache's bytes are compared with their checksums: before their first use (`lazy`),
            when it is opened (`open`), or never (`off`); see `HiddenStateCache.open`.
        device: `auto` is CUDA where there is one.
        backend: of every op; see `CrossanModel`.
        precision: `bf16` computes under autocast, `tf32` rounds what fp32 products multiply to TF32 (CUDA
            alone); weights, optimizer and evaluation are fp32 with each. `auto` is bf16 on a CUDA device
            with matrix units for it, else fp32: of CPUs those alone that multiply bf16 were measured to be
            faster in it, a step by a sixth at most, with the full softmax by a quarter to a third. A run
            keeps what it began with: its config.yaml has that in place of `auto`.
        tensorboard: also write TensorBoard's event files (needs the extra `tensorboard`).
        wandb: also log to this project of Weights & Biases (needs its package); None: don't.
        log_every: steps between two readings of losses and gradient norms, where anything logs them.
    """

    cache: str
    users: str
    run: str
    items: str | None = None
    data: str | None = None
    modalities: tuple[str, ...] | None = None
    init_from: str | None = None
    freeze: tuple[str, ...] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    split: SplitConfig = field(default_factory=SplitConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    columns: Mapping[str, Any] = field(default_factory=dict)
    item_columns: Mapping[str, Any] = field(default_factory=dict)
    min_rating: float | None = None
    min_items: int = 5
    max_items: int | None = None
    strict: bool = False
    batch_size: int = 64
    epochs: int = 50
    patience: int | None = 5
    evaluate_every: int = 1
    seed: int = 0
    verify: Verify = "lazy"
    device: str = "auto"
    backend: str = "auto"
    precision: Precision = "auto"
    tensorboard: bool = False
    wandb: str | None = None
    log_every: int = 50

    def __post_init__(self) -> None:
        _fit_fields(self, "")
        object.__setattr__(self, "model", {**CrossanConfig.defaults(self.model), **self.model})
        Columns(self.columns, USERS_ROLES)
        Columns(self.item_columns, ITEMS_ROLES, "item_columns")
        for name in ("batch_size", "epochs", "evaluate_every", "log_every"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        if self.split.by == "leave_one_out" and self.evaluation.users is None:
            _check(self.min_items >= 3, "min_items", "at least 3 (two targets and a history)", self.min_items)
        if self.evaluation.users is not None:
            kind = self.split.by
            _check(kind == "leave_one_out", "split.by", "leave_one_out, with evaluation.users", kind)
        if self.max_items is not None:
            least, why = (3, " (two targets and a history)") if self.split.by == "leave_one_out" else (1, "")
            _check(self.max_items >= least, "max_items", f"at least {least}{why} or null", self.max_items)
        if self.freeze is not None:
            _check(self.init_from is not None, "freeze", "null without init_from", self.freeze)
        _check(self.patience is None or self.patience >= 1, "patience", "at least 1 or null", self.patience)
        _check(0 <= self.seed < 2**31, "seed", "0 to 2^31 - 1", self.seed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from plain nested values; an unknown key is an error that names the nearest known one."""
        return cast(TrainConfig, _build(cls, values, ""))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as `from_dict` and YAML take them."""
        return cast("dict[str, Any]", _plain(self))

    def path(self, name: Literal["cache", "users", "items", "run"]) -> Path:
        """A path setting with `${data}` filled in; ValueError naming the setting where it can't be."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"{name}: expected a path, the config has none")
        return self.resolve(name, value)

    def resolve(self, name: str, value: str) -> Path:
        """A path that setting `name` holds, with `${data}` filled in; ValueError where it can't be."""
        if "${data}" in value:
            data = self.data or os.environ.get(DATA_VARIABLE)
            if not data:
                raise ValueError(
                    f"{name}: {value} needs the setting data=FOLDER or the environment variable "
                    f"{DATA_VARIABLE}, got neither"
                )
            value = value.replace("${data}", data)
        try:
            os.fsencode(value)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: {value!r} cannot be named in this process's encoding {error.encoding}, expected "
                "UTF-8 (PYTHONUTF8=1, or a locale such as C.UTF-8)"
            ) from error
        return Path(value).expanduser()

    def crossan_config(self, cache: HiddenStateCache) -> CrossanConfig:
        """The model's config over the cache's modalities."""
        held = {modality.name: modality for modality in cache.modalities}
        chosen: list[Modality] = []
        for name in self.modalities if self.modalities is not None else held:
            if name not in held:
                raise ValueError(
                    f"modalities: the cache holds {list(held)}, got {name!r}{nearest(name, held)}"
                )
            chosen.append(held[name])
        return CrossanConfig(modalities=tuple(chosen), **self.model)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and lay `key=value` overrides over it, nested ones as `model.dropout=0.2`.

    Another `model.architecture` than the file's brings its defaults in place of those of the file's.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: no YAML mapping, one with aliases or larger than settings are, an unknown key
            (with the nearest known one), or a value that does not fit; the key is named.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    values = parse_yaml(read_settings(path, "config"), "config", str(path))
    if not isinstance(values, dict):
        raise ValueError(f"config: expected a mapping in {path}, got {type(values).__name__}")
    return TrainConfig.from_dict(laid_over(values, overrides))


def _build(cls: type, values: object, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(f"{prefix.removesuffix('.') or 'config'}: expected fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls) if f.init}
    _refuse_unknown(values, known, prefix)
    required = ("cache", "users", "run") if cls is TrainConfig else ()
    if missing := [name for name in required if values.get(name) is None]:
        raise ValueError(f"config: expected {', '.join(missing)} to be set")
    built = {key: _fit(known[key], value, f"{prefix}{key}") for key, value in values.items()}
    if cls is TrainConfig and "model" in built:
        hints = typing.get_type_hints(CrossanConfig)
        allowed = {f.name: hints[f.name] for f in fields(CrossanConfig) if f.init and f.name != "modalities"}
        _refuse_unknown(built["model"], allowed, "model.")
        built["model"] = {k: _fit(allowed[k], v, f"model.{k}") for k, v in built["model"].items()}
    return cls(**built)


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    for key in values:
        if key not in known:
            hint = nearest_of_all(str(key), prefix.removesuffix("."), _sections())
            raise ValueError(f"unknown config key '{prefix}{key}'{hint}")


def _sections() -> dict[str, list[str]]:
    """Every key that a config has, by section; '' is the top."""
    classes = {
        "": TrainConfig,
        "model": CrossanConfig,
        "optimizer": OptimizerConfig,
        "split": SplitConfig,
        "evaluation": EvaluationConfig,
    }
    return {
        name: [f.name for f in fields(cls) if f.init and f.name != "modalities"]
        for name, cls in classes.items()
    }


def _fit(hint: Any, value: Any, name: str) -> Any:
    """`value` in the type of a field, or an error that names it; YAML reads `1e-3` as text."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        if value is None and type(None) in inner:
            return None
        first, *others = (a for a in inner if a is not type(None))
        if others:  # a number, or text
            return (
                value
                if isinstance(value, (int, float)) and not isinstance(value, bool)
                else _fit(str, value, name)
            )
        return _fit(first, value, name)
    if origin is Literal:
        value = "off" if value is False and "off" in inner else value  # YAML reads a bare `off` so
        _check(value in inner, name, f"one of {list(inner)}", value, nearest(str(value), inner))
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            value = [value]
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{name}: expected {len(inner)} values, got {value!r}")
        return tuple(_fit(inner[0], entry, name) for entry in value)
    if is_dataclass(hint):
        return value if isinstance(value, cast(type, hint)) else _build(cast(type, hint), value, f"{name}.")
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if hint is str and isinstance(value, datetime.date):  # as YAML reads 2020-01-31
        return value.isoformat()
    expected = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    if hint in expected:
        if hint is int and not isinstance(value, bool) and hasattr(value, "__index__"):  # NumPy's, too
            value = operator.index(value)
        right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        if not right:
            raise TypeError(f"{name}: expected {expected[hint]}, got {value!r}")
        if hint is int:
            _check(-(2**63) <= value < 2**63, name, "an integer of 64 bits", value)
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected fields, got {value!r}")
    return dict(value)


def _fit_fields(config: Any, prefix: str, but: str = "") -> None:
    """Give a config's fields, `but` one, their types: Python's callers may have had others."""
    hints = typing.get_type_hints(type(config))
    for name in (f.name for f in fields(config) if f.name != but):
        object.__setattr__(config, name, _fit(hints[name], getattr(config, name), f"{prefix}{name}"))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _check(right: bool, name: str, expected: str, value: object, hint: str = "") -> None:
    if not right:
        raise ValueError(f"{name}: expected {expected}, got {value!r}{hint}")
