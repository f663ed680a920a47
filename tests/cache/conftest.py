"""Four tiny encoders of real architectures with random weights, and raw items for them to read."""

from __future__ import annotations

import json
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossan_fast.data.items import ItemTable

WORDS = [
    "red",
    "green",
    "blue",
    "lamp",
    "chair",
    "table",
    "soft",
    "hard",
    "large",
    "small",
    "steel",
    "old",
    "new",
]
RATE = 16_000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of saved encoders: BERT (6 layers), ViT (4), VideoMAE (3), AST (2), each of another width."""
    import transformers as tf

    tf.logging.set_verbosity_error()
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    small = {"num_attention_heads": 2, "intermediate_size": 48}
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 255}

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (root / "bert").mkdir()
    (root / "bert" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tf.BertTokenizerFast(str(root / "bert" / "vocab.txt"), model_max_length=40).save_pretrained(root / "bert")
    bert = tf.BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=6, **small)
    tf.BertModel(bert).save_pretrained(root / "bert")

    vit = tf.ViTConfig(hidden_size=24, num_hidden_layers=4, image_size=16, patch_size=8, **small)
    tf.ViTModel(vit).save_pretrained(root / "vit")
    describe_pixels(root / "vit", "ViTImageProcessor", {"size": {"height": 16, "width": 16}, **pixels})

    mae = tf.VideoMAEConfig(
        hidden_size=20, num_hidden_layers=3, image_size=16, patch_size=8, num_frames=4, **small
    )
    tf.VideoMAEModel(mae).save_pretrained(root / "videomae")
    crop = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    describe_pixels(root / "videomae", "VideoMAEImageProcessor", {**crop, **pixels})

    ast = tf.ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        **small,
    )
    tf.ASTModel(ast).save_pretrained(root / "ast")
    tf.ASTFeatureExtractor(num_mel_bins=16, max_length=32).save_pretrained(root / "ast")
    return {name: root / name for name in ("bert", "vit", "videomae", "ast")}


def describe_pixels(folder: Path, processor: str, options: dict[str, object]) -> None:
    description = {
        "image_processor_type": processor,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 2,
        **options,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(description))


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="session")
def items(tmp_path_factory: pytest.TempPathFactory) -> ItemTable:
    """Fourteen sound items with a title, an image, a clip and a sound each, in several formats."""
    folder = tmp_path_factory.mktemp("items")
    random = np.random.default_rng(0)
    columns: dict[str, list[str | None]] = {"title": [], "image_path": [], "video_path": [], "audio_path": []}
    for number in range(14):
        columns["title"].append(" ".join(random.choice(WORDS, size=random.integers(1, 9))))
        pixels = random.integers(0, 256, (random.integers(12, 30), 20, 3), dtype=np.uint8)
        name = f"{number}{['.png', '.npy'][number % 2]}"
        if number % 2:
            np.save(folder / name, pixels)
        else:
            Image.fromarray(pixels).save(folder / name)
        columns["image_path"].append(name)
        clip = random.integers(0, 256, (random.integers(2, 9), 18, 22, 3), dtype=np.uint8)
        if number % 3 == 0:
            name = f"clip{number}"
            (folder / name).mkdir()
            for index, frame in enumerate(clip):
                Image.fromarray(frame).save(folder / name / f"frame{index + 1}.png")
        elif number % 3 == 1:
            name = f"clip{number}.npz"
            np.savez(folder / name, clip)
        else:
            name = f"clip{number}.npy"
            np.save(folder / name, clip)
        columns["video_path"].append(name)
        if number % 3 == 0:
            name = f"sound{number}.wav"
            write_wave(folder / name, random.uniform(-0.5, 0.5, 3000 + 100 * number))
        elif number % 3 == 1:
            name = f"sound{number}.npy"
            np.save(folder / name, random.uniform(-0.5, 0.5, 4000))
        else:
            name = f"spectrogram{number}.npy"
            np.save(folder / name, random.normal(size=(20 + 2 * number, 16)))
        columns["audio_path"].append(name)
    return ItemTable([f"item{n}" for n in range(14)], columns, folder)
