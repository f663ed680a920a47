"""Four real encoder architectures, tiny and randomly initialised, for the shop's raw items.

They stand in for the foundation models that a demo without a network can't download: the same classes, read
by the same code, with hidden states from which each modality's part of an item can be told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from crossan_fast.data.shop import CLIP_FRAMES, IMAGE_SIZE, SOUND_FRAMES, SOUND_MELS

WIDTH, LAYERS, PATCH = 64, 4, 8

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 2 * WIDTH,
    # Wider than a pretrained model's 0.02, so that random layers change what passes through them.
    "initializer_range": 0.1,
}


def save_tiny_encoders(folder: Path, titles: Iterable[str], seed: int) -> dict[str, Path]:
    """Write BERT, ViT, VideoMAE and AST with their preprocessing; gives each modality's folder."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()  # one for each of four tiny files says nothing
    paths = {name: folder / name for name in ("text", "image", "video", "audio")}
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
    words = sorted({word for title in titles for word in title.lower().split()})
    vocabulary = [*_SPECIAL, *words]
    (paths["text"] / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = tf.BertTokenizerFast(str(paths["text"] / "vocab.txt"), model_max_length=64)  # type: ignore[attr-defined]
    tokenizer.save_pretrained(paths["text"])
    pixels: dict[str, Any] = {"image_size": IMAGE_SIZE, "patch_size": PATCH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {
            "text": tf.BertModel(tf.BertConfig(vocab_size=len(vocabulary), **_SHAPE)),
            "image": tf.ViTModel(tf.ViTConfig(**pixels, **_SHAPE)),
            "video": tf.VideoMAEModel(
                tf.VideoMAEConfig(num_frames=CLIP_FRAMES, tubelet_size=2, **pixels, **_SHAPE)
            ),
            "audio": tf.ASTModel(
                tf.ASTConfig(
                    max_length=SOUND_FRAMES,
                    num_mel_bins=SOUND_MELS,
                    patch_size=PATCH,
                    frequency_stride=PATCH,
                    time_stride=PATCH,
                    **_SHAPE,
                )
            ),
        }
    for name, model in models.items():
        model.save_pretrained(paths[name])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    _describe(paths["image"], {"image_processor_type": "ViTImageProcessor", "size": size})
    video = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": size, "do_center_crop": True}
    _describe(paths["video"], {"image_processor_type": "VideoMAEImageProcessor", **video})
    return paths


def _describe(folder: Path, options: dict[str, object]) -> None:
    """The preprocessing as transformers keeps it beside a model."""
    common = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps({**common, **options}))
