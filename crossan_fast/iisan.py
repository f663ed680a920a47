"""Weights of IISAN's public code (GAIR-Lab/IISAN, `Code_Cached` and `Code_Cached_Asym`) in a `CrossanModel`.

The public model has two modalities, here `image` and `text`, and one inter-modal tower, here `image+text`:

| public name                                  | here                                |
| -------------------------------------------- | ----------------------------------- |
| mm_encoder.cv_adapter_list.{l}.fc_down/fc_up | towers.image.down/up, level l       |
| mm_encoder.bert_adapter_list.{l}…            | towers.text…                        |
| mm_encoder.mm_adapter_list.{l}…              | towers.image+text…                  |
| mm_encoder.side_gate_params_{cv,text,mm}.{l} | towers.….gate[l]                    |
| mm_encoder.down_project_list.{l}             | towers.image+text.narrow, level l   |
| mm_encoder.fc_{cv,bert,mm}                   | heads.….inner                       |
| mm_encoder.{cv_pre_fc,bert_pre_fc,fc_mm_down}| heads.…                             |
| com_dense                                    | fusion                              |
| user_encoder.transformer_encoder…            | sequence_encoder…                   |

`Code_Cached_Asym` has heads D→d→d; they load as D→D→d with the unused rows zero, which gives the same
embeddings (training goes on with the larger head). Adapter lists of unequal length have no counterpart here
and are refused. ReLU is assumed, the public default; its state dict does not say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crossan_fast._checks import describe
from crossan_fast._finite import first_nonfinite
from crossan_fast.config import CrossanConfig, Modality

if TYPE_CHECKING:
    from crossan_fast.model import CrossanModel

# Tower -> names of its adapters, gate and two head layers in the public code.
_TOWERS = {
    "image": ("cv_adapter_list", "side_gate_params_cv", "fc_cv", "cv_pre_fc"),
    "text": ("bert_adapter_list", "side_gate_params_text", "fc_bert", "bert_pre_fc"),
    "image+text": ("mm_adapter_list", "side_gate_params_mm", "fc_mm", "fc_mm_down"),
}
_BLOCK = {
    "multi_head_attention.w_Q.weight": "attention.query.weight",
    "multi_head_attention.w_K.weight": "attention.key.weight",
    "multi_head_attention.w_V.weight": "attention.value.weight",
    "multi_head_attention.fc.weight": "attention.out.weight",
    "multi_head_attention.layer_norm.": "attention_norm.",
    "feed_forward.w_1.": "widen.",
    "feed_forward.w_2.": "narrow.",
    "feed_forward.layer_norm.": "forward_norm.",
}


# Where trainers put the weights among what else they save: the public one, Lightning's, and others.
_INSIDE = ("model_state_dict", "state_dict", "model")


def read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a torch file, of which tensors and plain values alone are read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no torch file, one that holds more than that, or one without a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever an unpickler stumbles over
        first = " ".join(str(error).split(". ")[0].split())
        raise ValueError(
            f"checkpoint: {path} cannot be read, expected a torch file of tensors alone: {first[:200]}"
        ) from error
    for key in _INSIDE:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
    if not isinstance(saved, Mapping) or not any(isinstance(value, Tensor) for value in saved.values()):
        raise ValueError(
            f"checkpoint: {path}: expected a state dict, or one under {' or '.join(_INSIDE)}, got a "
            f"{type(saved).__name__}{f' of {list(saved)[:5]}' if isinstance(saved, Mapping) else ''}"
        )
    return saved


def load_iisan(cls: type[CrossanModel], state_dict: Mapping[str, Tensor], backend: str) -> CrossanModel:
    """Build the config from the shapes, then load every tensor; frozen backbones' entries are ignored.

    Raises:
        ValueError: a missing name, adapter lists of unequal length, or a weight that is not finite, by its
            public name.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected tensors by name, got {describe(state_dict)}")
    source = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    counts = {tower: _levels(source, names[0]) for tower, names in _TOWERS.items()}
    if len(set(counts.values())) != 1 or not counts["image"]:
        raise ValueError(
            f"state_dict: expected adapter lists of one length for every tower (mm_encoder.*_adapter_list), "
            f"got {counts}"
        )
    levels = counts["image"]
    widths = {
        tower: _get(source, f"mm_encoder.{names[0]}.0.fc_down.weight").shape[1]
        for tower, names in _TOWERS.items()
    }
    encoder = "user_encoder.transformer_encoder"
    position = _get(source, f"{encoder}.position_embedding.weight")
    config = CrossanConfig.iisan(
        [Modality(name, widths[name], levels) for name in ("image", "text")],
        embedding_dim=position.shape[1],
        bottleneck=_get(source, "mm_encoder.cv_adapter_list.0.fc_down.weight").shape[0],
        window=position.shape[0],
        blocks=_count(source, re.escape(f"{encoder}.transformer_blocks.") + r"(\d+)\."),
    )
    model = cls(config, backend=backend)
    model.load_state_dict({**_items(source, levels), **_sequence(source, encoder)}, strict=False)
    return model


def _items(source: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for tower, (adapters, gates, inner, outer) in _TOWERS.items():
        for ours, theirs in (("down", "fc_down"), ("up", "fc_up")):
            for kind in ("weight", "bias"):
                out[f"towers.{tower}.{ours}.{kind}"] = torch.stack(
                    [_get(source, f"mm_encoder.{adapters}.{lv}.{theirs}.{kind}") for lv in range(levels)]
                )
        gate = [_get(source, f"mm_encoder.{gates}.{level}").reshape(()) for level in range(levels)]
        out[f"towers.{tower}.gate"] = torch.stack(gate)
        weight, bias = (_get(source, f"mm_encoder.{inner}.{kind}") for kind in ("weight", "bias"))
        last = _get(source, f"mm_encoder.{outer}.weight")
        missing = weight.shape[1] - weight.shape[0]
        out[f"heads.{tower}.inner.weight"] = torch.nn.functional.pad(weight, (0, 0, 0, missing))
        out[f"heads.{tower}.inner.bias"] = torch.nn.functional.pad(bias, (0, missing))
        out[f"heads.{tower}.weight"] = torch.nn.functional.pad(last, (0, missing))
        out[f"heads.{tower}.bias"] = _get(source, f"mm_encoder.{outer}.bias")
    if _levels(source, "down_project_list"):
        for kind in ("weight", "bias"):
            out[f"towers.image+text.narrow.{kind}"] = torch.stack(
                [_get(source, f"mm_encoder.down_project_list.{lv}.{kind}") for lv in range(levels)]
            )
    for kind in ("weight", "bias"):
        out[f"fusion.{kind}"] = _get(source, f"com_dense.{kind}")
    return out


def _sequence(source: Mapping[str, Tensor], encoder: str) -> dict[str, Tensor]:
    out = {
        "sequence_encoder.position.weight": _get(source, f"{encoder}.position_embedding.weight"),
        "sequence_encoder.norm.weight": _get(source, f"{encoder}.layer_norm.weight"),
        "sequence_encoder.norm.bias": _get(source, f"{encoder}.layer_norm.bias"),
    }
    for name in source:
        if match := re.fullmatch(re.escape(encoder) + r"\.transformer_blocks\.(\d+)\.(.+)", name):
            index, rest = match.groups()
            for theirs, ours in _BLOCK.items():
                if rest.startswith(theirs):
                    ending = rest.removeprefix(theirs)
                    out[f"sequence_encoder.blocks.{index}.{ours}{ending}"] = _get(source, name)
    return out


def _get(source: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in source:
        raise ValueError(f"state_dict: expected {name!r} as in IISAN's public code, found none")
    tensor = source[name].detach()
    if bad := first_nonfinite([(name, tensor)]):
        raise ValueError(f"state_dict: {bad}")
    return tensor


def _levels(source: Mapping[str, Tensor], adapters: str) -> int:
    return _count(source, re.escape(f"mm_encoder.{adapters}.") + r"(\d+)\.")


def _count(source: Mapping[str, Tensor], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in source)
    return len({match.group(1) for match in matches if match})
