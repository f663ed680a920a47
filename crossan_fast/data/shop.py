r"""A synthetic shop whose items can be seen, read, watched and heard, and whose users have planted habits.

Each item has four hidden traits of four kinds each, and each trait shows in one modality alone:

    text    what the title says it is and is for      "Arlo brass kitchen kettle", "Vika oak garden rake"
    image   the colour of a textured square           [32, 32, 3] uint8, PNG
    video   which way a grey texture drifts           [4, 32, 32, 3] uint8, npy
    audio   the kind of sound in a mel spectrogram    [32, 32] float32 (frames, mels), npy

Everything else in them (makers, materials, gratings, tints, loudness, noise) tells nothing. A user's next
item follows, trait by trait and independently: most often the shop's own transition of the trait's kind in
the item before (two kinds lead to themselves, two to each other), now and then the user's favourite kind,
else any. Among the items of these four kinds, popularity (a mild Zipf law) decides. So a recommender that
sees k modalities can narrow the catalogue down to a 4^-k share of it; popularity alone hardly helps.

Written to a folder, a shop is what the readers read and encoders take:

    items.tsv       item<TAB>title<TAB>image_path<TAB>video_path<TAB>audio_path   (with this header)
    users.tsv       user<TAB>item item item ...                                    (time order, no header)
    images/NAME.png, clips/NAME.npy, sounds/NAME.npy
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crossan_fast._files import whole_new_folder
from crossan_fast.data.interactions import Interactions, build_interactions
from crossan_fast.data.items import ItemTable

MODALITIES = ("text", "image", "video", "audio")
NUM_KINDS = 4
NUM_CELLS = NUM_KINDS ** len(MODALITIES)

FOLLOW, FAVOURITE = 0.85, 0.1
"""Chances that a trait of the next item follows the transition, or is the user's favourite kind."""
ZIPF_EXPONENT = 0.25
MIN_LENGTH, MAX_LENGTH = 6, 13

IMAGE_SIZE = 32
CLIP_FRAMES = 4
SOUND_FRAMES = SOUND_MELS = 32

_PLACES = ("bedroom", "kitchen", "winter", "garden")
_NOUNS = (
    ("lamp", "lantern", "candle", "mirror"),
    ("kettle", "teapot", "jug", "bowl"),
    ("scarf", "shawl", "cap", "mitten"),
    ("spade", "rake", "hoe", "bench"),
)
# fmt: off
_MATERIALS = (
    "oak", "brass", "wool", "steel", "clay", "bamboo", "copper", "linen", "glass", "cork", "felt", "pine",
)
_MAKERS = (
    "Arlo", "Bexa", "Corin", "Dova", "Elgo", "Fenn", "Garo", "Hild", "Ivar", "Jute", "Kelda", "Lomo",
    "Mirk", "Nelo", "Orsa", "Pell", "Quin", "Rova", "Sven", "Tindra", "Ulmo", "Vika", "Wexel", "Yarn",
)
# fmt: on
_COLOURS = np.array([[215, 50, 40], [50, 180, 60], [50, 80, 215], [225, 200, 50]], dtype=np.float64)
# A period of 8 divides the patch sizes in use, so that a pattern looks alike in every patch.
_PERIOD = 8
# Pixels a frame. At 2, frames 0 and 2 would be half a period apart, and a mean over time would cancel them.
_DRIFT = 1
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


@dataclass(frozen=True)
class Shop:
    """N items, U users; `traits[i, m]` is the kind (0 to 3) that modality m of item i shows."""

    seed: int
    item_names: list[str]
    titles: list[str]
    images: npt.NDArray[np.uint8]
    """[N, 32, 32, 3]"""
    clips: npt.NDArray[np.uint8]
    """[N, 4, 32, 32, 3]"""
    sounds: npt.NDArray[np.float32]
    """[N, 32, 32]: mel spectrograms, frames by mels."""
    sequences: dict[str, list[str]]
    """Item names that each user took, oldest first."""
    traits: npt.NDArray[np.int64]
    """[N, 4], in the order of `MODALITIES`."""
    appeal: npt.NDArray[np.float64]
    """[N]: how an item is weighted among those of its four kinds."""
    next_kind: npt.NDArray[np.int64]
    """[4, 4]: the kind that modality m's transition leads to from each kind."""
    folder: Path | None = None
    """Where the shop was written, with `items.tsv` and `users.tsv` in it."""

    def item_table(self) -> ItemTable:
        """What `read_items` gives for the written items file."""
        columns: dict[str, list[str | None]] = {"title": list(self.titles)}
        for column, pattern in _MEDIA.items():
            columns[column] = [pattern.format(name) for name in self.item_names]
        return ItemTable(list(self.item_names), columns, self.folder or Path())

    def interactions(self) -> Interactions:
        """What `read_interactions` gives for the written users file."""
        return build_interactions(self.sequences, self.item_names)


def make_shop(
    folder: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    num_items: int = 1024,
    num_users: int = 2000,
) -> Shop:
    """Make a shop, and write it to `folder` unless that is None; the same arguments make the same shop.

    The folder appears whole or not at all. Writing needs Pillow (extra `encoders`). Raises ValueError for
    fewer items than the 256 combinations of kinds or fewer than one user, FileExistsError where `folder`
    holds something.
    """
    if num_items < NUM_CELLS:
        raise ValueError(
            f"num_items: expected at least {NUM_CELLS}, one for each combination of kinds, got {num_items}"
        )
    if num_users < 1:
        raise ValueError(f"num_users: expected at least 1, got {num_users}")
    # One stream a part, so that more users or items leave the other parts' random numbers alone.
    streams = np.random.SeedSequence(seed).spawn(6)
    latent, behaviour, text, image, video, audio = (np.random.default_rng(stream) for stream in streams)

    cells = latent.permutation(np.arange(num_items) % NUM_CELLS)
    traits = np.stack(np.unravel_index(cells, (NUM_KINDS,) * len(MODALITIES)), axis=1).astype(np.int64)
    appeal = np.power(1.0 + latent.permutation(num_items), -ZIPF_EXPONENT, dtype=np.float64)
    next_kind = np.stack([_transition(latent) for _ in MODALITIES])

    item_names = [f"item-{i:0{len(str(num_items))}d}" for i in range(1, num_items + 1)]
    user_names = [f"user-{u:0{len(str(num_users))}d}" for u in range(1, num_users + 1)]
    taken = _behaviour(behaviour, num_users, cells, traits, appeal, next_kind)
    lengths = behaviour.integers(MIN_LENGTH, MAX_LENGTH + 1, size=num_users)
    shop = Shop(
        seed=seed,
        item_names=item_names,
        titles=_titles(text, traits[:, 0]),
        images=_images(image, traits[:, 1]),
        clips=_clips(video, traits[:, 2]),
        sounds=_sounds(audio, traits[:, 3]),
        sequences={
            user: [item_names[i] for i in row[:length]]
            for user, row, length in zip(user_names, taken.tolist(), lengths.tolist(), strict=True)
        },
        traits=traits,
        appeal=appeal,
        next_kind=next_kind,
        folder=None if folder is None else Path(folder),
    )
    if shop.folder is not None:
        _write(shop, shop.folder)
    return shop


def _transition(rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """[kinds]: two random kinds lead to themselves, the other two to each other.

    Likes that lead to likes are learned at once and show a model which direction a trait has in embeddings;
    with a cycle through all four kinds training stands still for dozens of epochs before it finds each trait.
    """
    following = np.arange(NUM_KINDS)
    one, other = rng.permutation(NUM_KINDS)[:2]
    following[[one, other]] = other, one
    return following


def _behaviour(
    rng: np.random.Generator,
    num_users: int,
    cells: npt.NDArray[np.int64],
    traits: npt.NDArray[np.int64],
    appeal: npt.NDArray[np.float64],
    next_kind: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """[U, MAX_LENGTH]: item numbers, all users taking a step at a time."""
    favourite = rng.integers(0, NUM_KINDS, size=(num_users, len(MODALITIES)))
    # Items grouped by cell, with running sums of appeal: drawing from a cell is one search.
    by_cell = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[by_cell], np.arange(NUM_CELLS + 1))
    cumulative = np.concatenate([[0.0], np.cumsum(appeal[by_cell])])

    taken = np.empty((num_users, MAX_LENGTH), dtype=np.int64)
    for step in range(MAX_LENGTH):
        chance = rng.random((num_users, len(MODALITIES)))
        kinds = rng.integers(0, NUM_KINDS, size=(num_users, len(MODALITIES)))
        kinds = np.where(chance >= 1 - FAVOURITE, favourite, kinds)
        if step > 0:
            followed = next_kind[np.arange(len(MODALITIES)), traits[taken[:, step - 1]]]
            kinds = np.where(chance < FOLLOW, followed, kinds)
        cell = np.ravel_multi_index(tuple(kinds.T), (NUM_KINDS,) * len(MODALITIES))
        first, last = starts[cell], starts[cell + 1]
        point = cumulative[first] + rng.random(num_users) * (cumulative[last] - cumulative[first])
        # Rounding may carry a point to the end of its cell: clip keeps it inside.
        taken[:, step] = by_cell[np.clip(np.searchsorted(cumulative, point, "right") - 1, first, last - 1)]
    return taken


def _titles(rng: np.random.Generator, kinds: npt.NDArray[np.int64]) -> list[str]:
    """Distinct while a kind has no more items than the 1,152 ways to name them."""
    ways = (len(_MAKERS), len(_MATERIALS), len(_NOUNS[0]))
    titles = [""] * len(kinds)
    for kind in range(NUM_KINDS):
        of_kind = np.flatnonzero(kinds == kind)
        picks = np.resize(rng.permutation(np.prod(ways)), len(of_kind))
        for i, maker, material, noun in zip(of_kind, *np.unravel_index(picks, ways), strict=True):
            titles[i] = f"{_MAKERS[maker]} {_MATERIALS[material]} {_PLACES[kind]} {_NOUNS[kind][noun]}"
    return titles


def _noisy_bytes(rng: np.random.Generator, values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    noise = 10 * rng.standard_normal(values.shape, dtype=np.float32)
    return np.clip(np.rint(values + noise), 0, 255).astype(np.uint8)


def _images(rng: np.random.Generator, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The kind's colour under a grey grating of random direction, with pixel noise."""
    n = len(kinds)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    angle, phase = rng.uniform(0, 2 * np.pi, size=(2, n, 1, 1))
    wave = np.sin(2 * np.pi / _PERIOD * (np.cos(angle) * x + np.sin(angle) * y) + phase)  # [N, H, W]
    colour = _COLOURS[kinds] + rng.normal(0, 12, size=(n, 3))  # [N, 3]
    image = colour[:, None, None].astype(np.float32) + 25 * wave[..., None].astype(np.float32)
    return _noisy_bytes(rng, image)


def _clips(rng: np.random.Generator, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """One blurred checkerboard that drifts in the kind's direction, tinted at random, with pixel noise.

    Every clip shows the same texture from the same start: the first frame tells nothing about the kind.
    """
    n = len(kinds)
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE]
    frames = np.arange(CLIP_FRAMES)[:, None, None]
    drifts = []
    for down, right in _DIRECTIONS:
        across = np.sin(2 * np.pi / _PERIOD * (x - _DRIFT * right * frames) + 0.8)
        along = np.sin(2 * np.pi / _PERIOD * (y - _DRIFT * down * frames) + 0.8)
        drifts.append(across * along + 0.5 * across + 0.5 * along)
    texture = np.stack(drifts).astype(np.float32)[kinds]  # [N, T, H, W]
    tint = rng.normal(128, 15, size=(n, 1, 1, 1, 3)).astype(np.float32)
    return _noisy_bytes(rng, tint + 50 * texture[..., None])


def _sounds(rng: np.random.Generator, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Steady tones, clicks, rising or falling sweeps, of random loudness over noise."""
    n = len(kinds)
    frame, mel = np.mgrid[0:SOUND_FRAMES, 0:SOUND_MELS]
    patterns = np.stack([mel, frame, mel - frame, mel + frame])  # constant along a sound's ridges
    ridges = np.cos(2 * np.pi / _PERIOD * patterns)[kinds]  # [N, frames, mels]
    loudness = rng.uniform(0.8, 1.2, size=(n, 1, 1))
    offset = rng.normal(0, 0.2, size=(n, 1, 1))
    return (loudness * ridges + offset + rng.normal(0, 0.3, size=ridges.shape)).astype(np.float32)


_MEDIA = {
    "image_path": "images/{}.png",
    "video_path": "clips/{}.npy",
    "audio_path": "sounds/{}.npy",
}


def _write(shop: Shop, folder: Path) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "folder: writing a shop's images needs Pillow: pip install 'crossan-fast[encoders]'"
        ) from error
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder: expected a new or empty folder, {folder} holds something")
    with whole_new_folder(folder) as draft:
        for pattern in _MEDIA.values():
            (draft / pattern).parent.mkdir()
        media = zip(shop.item_names, shop.images, shop.clips, shop.sounds, strict=True)
        for name, image, clip, sound in media:
            Image.fromarray(image).save(draft / _MEDIA["image_path"].format(name))
            np.save(draft / _MEDIA["video_path"].format(name), clip)
            np.save(draft / _MEDIA["audio_path"].format(name), sound)
        table = shop.item_table()
        lines = ["\t".join(["item", *table.columns])]
        lines += ["\t".join(map(str, row)) for row in zip(table.names, *table.columns.values(), strict=True)]
        (draft / "items.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        users = [f"{user}\t{' '.join(names)}" for user, names in shop.sequences.items()]
        (draft / "users.tsv").write_text("\n".join(users) + "\n", encoding="utf-8")
