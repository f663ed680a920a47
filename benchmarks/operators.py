"""From an op, its inputs and its backends to a `Workload`: what all cases of ops share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks import accuracy
from benchmarks.registry import KERNELS, CheckFailed, Floor, Runnable, Setting, Unavailable, Workload

Tensors = Sequence[Tensor]
Call = Callable[[Tensors, Tensors, str], Tensors]
_EXACT = -1  # the number of the inputs that an `ExactOperator` is checked on


@dataclass(frozen=True)
class Part:
    """A piece of the inputs; `weight` is its share of a scalar loss, None: rows are joined to the others'."""

    inputs: Tensors
    cotangents: Tensors
    weight: float | None = None


@dataclass
class Operator:
    """A differentiable op over fixed weights and several input sets.

    Attributes:
        setting: device and the type to compute in.
        weights: fp32 leaves, shared by the sets.
        sets: the inputs of each call; the first `differentiable` of them get gradients too.
        call: (weights, inputs, backend) → outputs. With float64 weights and `eager` it computes in float64,
            whatever the type of those inputs that are not differentiable.
        cotangents: the gradient of each output, fp32 at its shape.
        floors: see `Workload`.
        differentiable: how many of a set's tensors get gradients.
        split: the float64 reference runs piece by piece, to bound its memory; default: one piece.
        peers: others' implementations, each as `call` without the backend.
    """

    setting: Setting
    weights: Tensors
    sets: Sequence[Tensors]
    call: Call
    cotangents: Tensors
    floors: Mapping[str, Floor]
    differentiable: int = 0
    split: Callable[[Tensors, Tensors], Iterator[Part]] | None = None
    peers: Mapping[str, Callable[[Tensors, Tensors], Tensors]] | None = None
    _cast: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def workload(self, notes: Sequence[str] = ()) -> Workload:
        implementations: dict[str, Callable[[], Runnable]] = {
            "eager": lambda: self._runnable("eager", self._plain),
            "compiled": self._compiled,
        }
        if self._low:
            implementations["autocast"] = lambda: self._runnable("eager", self._mixed)
        for name in KERNELS:
            if name.endswith("-graph"):
                implementations[name] = partial(self._graphed, name.removesuffix("-graph"))
            else:
                implementations[name] = partial(self._made, name)
        for name, peer in (self.peers or {}).items():
            implementations[name] = partial(self._peer, peer)
        return Workload(len(self.sets), implementations, self._check, self.floors, notes)

    @property
    def _low(self) -> bool:
        return self.setting.dtype in (torch.bfloat16, torch.float16)

    # -- leaves ----------------------------------------------------------------------------------------

    @cached_property
    def _plain(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Weights and sets all in the setting's type, what gets gradients a leaf."""
        weights = [_leaf(w.to(self.setting.dtype)) for w in self.weights]
        return [(weights, self._inputs(inputs)) for inputs in self.sets]

    @cached_property
    def _mixed(self) -> list[tuple[list[Tensor], list[Tensor]]]:
        """As in training: fp32 weights; in bf16 the op runs under autocast."""
        if not self._low:
            return self._plain
        weights = [_leaf(w) for w in self.weights]
        return [(weights, inputs) for _, inputs in self._plain]

    def _inputs(self, inputs: Tensors) -> list[Tensor]:
        return [_leaf(t) if i < self.differentiable else t for i, t in enumerate(inputs)]

    def _autocast(self, weights: Tensors) -> contextlib.AbstractContextManager[object]:
        mixed = self._low and any(w.dtype == torch.float32 for w in weights)
        if not mixed:
            return contextlib.nullcontext()
        return torch.autocast(self.setting.device.type, dtype=self.setting.dtype)

    # -- implementations -------------------------------------------------------------------------------

    def _made(self, backend: str) -> Runnable:
        return self._runnable(backend, self._mixed)

    def _runnable(self, backend: str, leaves: list[tuple[list[Tensor], list[Tensor]]]) -> Runnable:
        def forward(index: int) -> Tensors:
            weights, inputs = leaves[index]
            with self._autocast(weights):
                return self.call(weights, inputs, backend)

        return Runnable(forward, self._backward(leaves))

    def _backward(self, leaves: list[tuple[list[Tensor], list[Tensor]]]) -> Callable[[int, Tensors], Tensors]:
        def backward(index: int, outputs: Tensors) -> Tensors:
            weights, inputs = leaves[index]
            return torch.autograd.grad(
                list(outputs),
                [*inputs[: self.differentiable], *weights],
                self._cotangents_of(outputs),
                allow_unused=True,
                materialize_grads=True,
            )

        return backward

    def _compiled(self) -> Runnable:
        # One graph or an error: a baseline fallen apart into pieces would be slow for no reason of its own.
        compiled = torch.compile(
            lambda weights, inputs: self.call(weights, inputs, "eager"),
            mode="max-autotune",
            dynamic=False,
            fullgraph=True,
        )
        leaves = self._plain
        # Called once plain, so that values which the op computes on first use are there to be read.
        self.call(*leaves[0], "eager")
        for weights, inputs in leaves:
            # CUDA graphs copy inputs that may move; these don't, and the baseline is spared the copy.
            for tensor in (*weights, *inputs):
                torch._dynamo.mark_static_address(tensor, guard=False)

        def forward(index: int) -> Tensors:
            return compiled(*leaves[index])

        cuda = self.setting.device.type == "cuda"
        begin = torch.compiler.cudagraph_mark_step_begin if cuda else None
        return Runnable(forward, self._backward(leaves), memory=not cuda, begin=begin)

    def _graphed(self, backend: str) -> Runnable:
        """Forward and backward of each set captured as CUDA graphs: what a training step replays."""
        if self.setting.device.type != "cuda":
            raise Unavailable("CUDA graphs need a CUDA device")
        plain = self._runnable(backend, self._mixed)
        assert plain.backward is not None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                plain.backward(0, plain.forward(0))
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        captured = []
        for index in range(len(self.sets)):
            graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[0], pool=pool):
                outputs = plain.forward(index)
            with torch.cuda.graph(graphs[1], pool=pool):
                gradients = plain.backward(index, outputs)
            captured.append((*graphs, outputs, gradients))

        def forward(index: int) -> Tensors:
            captured[index][0].replay()
            return captured[index][2]

        def backward(index: int, outputs: Tensors) -> Tensors:
            captured[index][1].replay()
            return captured[index][3]

        return Runnable(forward, backward, memory=False)

    def _peer(self, peer: Callable[[Tensors, Tensors], Tensors]) -> Runnable:
        leaves = self._mixed

        def forward(index: int) -> Tensors:
            return peer(*leaves[index])

        return Runnable(forward, self._backward(leaves))

    def _cotangents_of(self, outputs: Tensors) -> list[Tensor]:
        # Cast once: a conversion inside the timed backward would not be the implementation's.
        for number, output in enumerate(outputs):
            if (number, output.dtype) not in self._cast:
                self._cast[number, output.dtype] = self.cotangents[number].to(output.dtype)
        return [self._cast[number, output.dtype] for number, output in enumerate(outputs)]

    # -- check -----------------------------------------------------------------------------------------

    def _check(self, implementation: str, runnable: Runnable) -> None:
        if runnable.begin is not None:
            runnable.begin()
        outputs = runnable.forward(0)
        assert runnable.backward is not None
        gradients = runnable.backward(0, outputs)
        truth, own = self._truth
        names = [f"output {i}" for i in range(len(outputs))]
        names += [f"gradient {i}" for i in range(len(gradients))]
        found = [*(o.detach() for o in outputs), *gradients]
        terms = max(sum(t.numel() for t in tensors) for tensors in (outputs, self.sets[0]))
        accuracy.compare(implementation, names, found, truth, own, self.setting.dtype, terms)

    @cached_property
    def _truth(self) -> tuple[list[Tensor], list[float]]:
        """Set 0's outputs and gradients in float64, and how far plain torch in the setting's type is off.

        Torch has two ways in a 16-bit type: all in that type, and autocast from fp32 weights, as ours run.
        Either may round a tensor of few numbers well by chance: the worse of the two is torch's own.
        """
        truth = self._by_parts(torch.float64)
        ways = [self._by_parts(self.setting.dtype)]
        if self._low:
            ways.append(self._by_parts(torch.float32))
        return truth, [max(accuracy.error(p, t) for p in own) for t, *own in zip(truth, *ways, strict=True)]

    def _by_parts(self, dtype: torch.dtype) -> list[Tensor]:
        """The plain reference from weights in `dtype`, piece by piece, what adds up added in float64."""
        weights = [_leaf(w.to(dtype)) for w in self.weights]
        first, rest = self.sets[0][: self.differentiable], self.sets[0][self.differentiable :]
        leaves = [_leaf(t.to(dtype)) for t in first]
        inputs = [*leaves, *rest]
        whole = Part(inputs, self.cotangents)
        totals = [torch.zeros_like(t, dtype=torch.float64) for t in (*leaves, *weights)]
        rows: list[list[Tensor]] = []
        scalars: list[list[Tensor]] = []
        for part in [whole] if self.split is None else self.split(inputs, self.cotangents):
            with self._autocast(weights):
                outputs = self.call(weights, part.inputs, "eager")
            if part.weight is None:
                rows.append([o.detach() for o in outputs])
            else:
                outputs = [o * part.weight for o in outputs]
                scalars.append([o.detach().double() for o in outputs])
            gradients = torch.autograd.grad(
                list(outputs),
                [*leaves, *weights],
                [c.to(o.dtype) for c, o in zip(part.cotangents, outputs, strict=True)],
                allow_unused=True,
                materialize_grads=True,
            )
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
        joined = [torch.cat(column) if len(column) > 1 else column[0] for column in zip(*rows, strict=True)]
        joined += [torch.stack(column).sum(0) for column in zip(*scalars, strict=True)]
        return joined + totals


@dataclass
class ExactOperator:
    """An op without gradients whose results are compared for equality.

    Attributes:
        setting: device and type.
        sets: random inputs to time.
        exact: inputs of the same shapes on which floating point is exact in any order of summation.
        call: (inputs, backend) → outputs.
        truth: the reference; default: `call` with `eager`, on `exact` in float64.
        floor: of the one pass.
    """

    setting: Setting
    sets: Sequence[Tensors]
    exact: Tensors
    call: Callable[[Tensors, str], Tensors]
    floor: Floor
    compiled: bool = True

    def workload(self, notes: Sequence[str] = ()) -> Workload:
        implementations: dict[str, Callable[[], Runnable]] = {
            name: partial(self._plain, name) for name in ("eager", "cpp", "triton", "cuda")
        }
        if self.compiled:
            implementations["compiled"] = self._compiled
        return Workload(len(self.sets), implementations, self._check, {"run": self.floor}, notes)

    def _compiled(self) -> Runnable:
        compiled = torch.compile(
            lambda inputs: self.call(inputs, "eager"), mode="max-autotune", dynamic=False
        )
        cuda = self.setting.device.type == "cuda"
        begin = torch.compiler.cudagraph_mark_step_begin if cuda else None
        return Runnable(lambda index: compiled(self._inputs(index)), memory=not cuda, begin=begin)

    def _plain(self, backend: str) -> Runnable:
        return Runnable(lambda index: self.call(self._inputs(index), backend))

    def _inputs(self, index: int) -> Tensors:
        return self.exact if index == _EXACT else self.sets[index]

    @cached_property
    def _truth(self) -> list[Tensor]:
        wide = [t.double() if t.is_floating_point() else t for t in self.exact]
        return list(self.call(wide, "eager"))

    def _check(self, implementation: str, runnable: Runnable) -> None:
        found = runnable.forward(_EXACT)
        if len(found) != len(self._truth):
            raise CheckFailed(f"{implementation}: expected {len(self._truth)} results, got {len(found)}")
        names = [f"output {i}" for i in range(len(found))]
        accuracy.compare_exact(implementation, names, found, self._truth)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def set_count(bytes_per_set: float, device: torch.device) -> int:
    """How many input sets to rotate so that caches do not serve them: two at least, eight at most."""
    cache = 256e6 if device.type == "cuda" else 512e6
    return int(min(8, max(2, -(-cache // max(bytes_per_set, 1)))))
