"""cache build: a frozen text encoder over raw titles, against the plain loop in the items' order."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.registry import Case, CheckFailed, Runnable, Setting, Unavailable, Workload, register
from crossan_fast.cache import HiddenStateCache, ModalitySpec, build_cache, evenly
from crossan_fast.data import ItemTable

ITEMS, BATCH, MAX_LENGTH = 256, 64, 30
LAYERS, LEVELS = 6, 7
WORDS = 1_000
CLOSE = 1e-4  # relative: padded to another length, a text's sums have another order


def titles(items: int) -> list[str]:
    """Of 2 to 40 words, most of them short, as titles are."""
    drawn = random.Random(0)
    lengths = [2 + int(38 * drawn.random() ** 2) for _ in range(items)]
    return [" ".join(f"w{drawn.randrange(WORDS)}" for _ in range(length)) for length in lengths]


def save_encoder(folder: Path, width: int, heads: int) -> None:
    """A BERT of MiniLM's depth with random weights."""
    transformers: Any = importlib.import_module("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(WORDS))]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)


def build(items: int, width: int, heads: int, setting: Setting) -> Workload:
    """Encoder loaded, titles tokenized, every layer's tokens averaged; ours writes a cache, too."""
    if importlib.util.find_spec("transformers") is None:
        raise Unavailable("transformers is not installed")
    folder = tempfile.TemporaryDirectory(prefix="crossan_fast-bench-")
    encoder = Path(folder.name) / "encoder"
    save_encoder(encoder, width, heads)
    texts = titles(items)
    table = ItemTable([str(row) for row in range(1, items + 1)], {"title": list(texts)}, Path(folder.name))
    spec = ModalitySpec("text", str(encoder), levels=LEVELS)
    turns = itertools.count()

    def built(_: int) -> Sequence[Tensor]:
        out = Path(folder.name) / f"cache{next(turns)}"
        build_cache(
            table,
            [spec],
            out,
            dtype="fp32",
            batch_size=BATCH,
            device=setting.device,
            max_length=MAX_LENGTH,
            progress=False,
        )
        return [HiddenStateCache.open(out).states("cpu")[0][1:]]

    def plain(_: int) -> Sequence[Tensor]:
        return [plain_states(Path(folder.name) / "encoder", texts, setting.device)]

    truth = plain_states(encoder, texts, setting.device).double()

    def check(name: str, runnable: Runnable) -> None:
        difference = (runnable.forward(0)[0].double() - truth).norm() / truth.norm()
        if not float(difference) <= CLOSE:
            raise CheckFailed(f"{name}: states err by {float(difference):.2e} from the plain loop's")

    made = {
        "eager": lambda: Runnable(plain, memory=False, once=True),
        "host": lambda: Runnable(built, memory=False, once=True),
    }
    return Workload(1, made, check)


@torch.no_grad()
def plain_states(encoder: Path, texts: Sequence[str], device: torch.device) -> Tensor:
    """`[items, L, D]` as one writes it at first: batches in the items' order, each padded to its longest."""
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).to(device).eval()
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            list(texts[start : start + BATCH]),
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        ).to(device)
        hidden = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][:, :, None]
        states = [(hidden[level] * mask).sum(1) / mask.sum(1) for level in evenly(LEVELS, LAYERS)]
        parts.append(torch.stack(states, dim=1).cpu())
    return torch.cat(parts)


def _minilm(setting: Setting) -> Workload:
    return build(ITEMS, 384, 12, setting)


register(
    Case(
        name=f"cache_build/items={ITEMS},layers={LAYERS},D=384",
        build=_minilm,
        dtypes=("fp32",),
        tags=frozenset({"cache"}),
        importance=51,
    )
)
