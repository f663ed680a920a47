"""A training step on fake tensors of a GPU: no wait for the device, one device, types as documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import GPU, Watch, fake_gpu, on_fake_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

import crossan_fast._losses
from crossan_fast import CrossanConfig, CrossanModel, HiddenStateCache, Modality
from crossan_fast.kernels import _streaming_loss
from crossan_fast.kernels.side_network.data import Data
from crossan_fast.output import CrossanOutput
from crossan_fast.training import OptimizerConfig, TrainStep, make_optimizer

ITEMS, USERS, WINDOW, LEVELS = 12, 3, 4, 2
EQUAL, UNEQUAL = (16, 16, 16), (16, 32, 16)
OPTIMIZER = OptimizerConfig(warmup_steps=2, average=0.99)


def make_cache(widths: tuple[int, ...], dtype: torch.dtype, missing: bool) -> HiddenStateCache:
    states = {f"m{m}": torch.zeros(ITEMS + 1, LEVELS, width).to(dtype) for m, width in enumerate(widths)}
    scales = None
    if dtype in (torch.int8, torch.float8_e4m3fn):
        scales = {name: torch.zeros(ITEMS + 1, LEVELS) for name in states}
    present = torch.ones(ITEMS + 1, len(widths), dtype=torch.bool)
    present[0] = False
    present[1::2, 0] = not missing
    return HiddenStateCache.from_tensors(states, present, scales=scales)


def step(
    widths: tuple[int, ...] = EQUAL,
    precision: str = "bf16",
    stored: torch.dtype = torch.bfloat16,
    missing: bool = False,
    **options: Any,
) -> tuple[CrossanOutput, CrossanModel]:
    """A step's output, and the model with its gradients."""
    make = CrossanConfig.iisan if options.pop("iisan", False) else CrossanConfig
    modalities = [Modality(f"m{m}", width, LEVELS) for m, width in enumerate(widths)]
    config = make(modalities, bottleneck=4, embedding_dim=8, window=WINDOW, **options)
    cache, outputs = make_cache(widths, stored, missing), []
    with fake_gpu() as mode:
        with GPU:
            model = CrossanModel(config, backend="triton")
            model.item_popularity = torch.ones(ITEMS + 1)
            item_ids = torch.zeros(USERS, WINDOW + 1, dtype=torch.int64)
        model.register_forward_hook(lambda module, args, output: outputs.append(output))
        train = TrainStep(
            model,
            on_fake_gpu(cache, mode, not missing),
            make_optimizer(model, OPTIMIZER),
            OPTIMIZER,
            precision,
        )
        with Watch():
            loss = train(item_ids)
    assert (loss.shape, loss.dtype, loss.device) == ((), torch.float32, GPU)
    return outputs[0], model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "missing, dropout of modalities": {"missing": True, "modality_dropout": 0.3},
    "dropout of modalities alone": {"modality_dropout": 0.3},
    "balance, top 2": {"load_balance": 0.1, "top_k": 2},
    "by place": {"deduplicate": False, "missing": True},
    "cross=side": {"cross": "side", "missing": True},
    "cross=none": {"cross": "none"},
    "widths differ": {"widths": UNEQUAL, "missing": True},
    "widths differ, cross=side": {"widths": UNEQUAL, "cross": "side"},
    "iisan": {"iisan": True},
    "iisan, widths differ": {"iisan": True, "widths": UNEQUAL, "missing": True, "modality_dropout": 0.3},
    "int8": {"stored": torch.int8},
    "fp8": {"stored": torch.float8_e4m3fn, "missing": True},
    "one modality": {"widths": (16,)},
    "last targets": {"targets": "last", "missing": True},
}


FULL = ("plain", "missing, dropout of modalities", "by place", "iisan", "widths differ")
FP32 = ("plain", "missing, dropout of modalities", "cross=side", "iisan, widths differ")


@pytest.mark.parametrize(
    "name, precision, loss",
    [
        *((name, "bf16", "in_batch") for name in CASES),
        *((name, "bf16", "full") for name in FULL),
        *((name, "fp32", "in_batch") for name in FP32),
        ("plain", "fp32", "full"),
        ("plain", "bf16", "sampled"),
        ("missing, dropout of modalities", "fp32", "sampled"),
    ],
)
def test_a_step(name: str, precision: str, loss: str) -> None:
    output, model = step(precision=precision, loss=loss, **CASES[name])
    computed = torch.bfloat16 if precision == "bf16" else torch.float32
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert (value.grad.shape, value.grad.dtype, value.grad.device) == (value.shape, torch.float32, GPU)
    assert output.item_embeddings.dtype == computed and output.item_embeddings.device == GPU
    assert output.user_embeddings.dtype == torch.float32 and output.user_embeddings.device == GPU


def looks(table: Tensor, index: Tensor) -> Tensor:
    return table[index] * table.detach().sum().item()


def branches(table: Tensor, index: Tensor) -> Tensor:
    return table[index] if table.any() else table[index].clone()


def counts(table: Tensor, index: Tensor) -> Tensor:
    return table[index] + table.nonzero().shape[0]


def mixes(table: Tensor, index: Tensor) -> Tensor:
    return table[index] + torch.ones(table.shape[1], device="cpu")


def fetches(table: Tensor, index: Tensor) -> Tensor:
    return table.cpu()[index.cpu()].to(table.device)


@pytest.mark.parametrize(
    "fault, message",
    [
        (looks, "_local_scalar_dense"),
        (branches, "_local_scalar_dense"),
        (counts, "nonzero"),
        (mixes, r"add.*: expected cuda:0 alone, got \['cpu', 'cuda:0'\]"),
        (fetches, "_to_copy.*: expected cuda:0 alone"),
    ],
)
def test_a_fault_of_the_model_is_found(
    fault: Callable[[Tensor, Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossan_fast._losses, "rows_of", fault)
    with pytest.raises(
        (RuntimeError, DataDependentOutputException, DynamicOutputShapeException), match=message
    ):
        step(loss="full")


def test_a_look_from_a_kernel_s_host_function_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Data.of

    def of(states: Any, scales: Any, ids: Tensor, present: Any) -> Data:
        assert int(ids.max()) < len(states[0])
        return made(states, scales, ids, present)

    monkeypatch.setattr(Data, "of", of)
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        step()


def test_a_gradient_of_another_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _streaming_loss.backward
    monkeypatch.setattr(_streaming_loss, "backward", lambda *args: tuple(g.double() for g in made(*args)))
    with pytest.raises(AssertionError, match="in_batch_loss_backward"):
        step()
