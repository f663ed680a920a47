"""The side network's parameters under the names that the state dict promises; the arithmetic is the op's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from crossan_fast.config import CrossanConfig
from crossan_fast.modules.fusion import folded
from crossan_fast.modules.linear import own
from crossan_fast.ops._contracts import SideNetworkStructure, SideNetworkWeights
from crossan_fast.ops.side_network import side_network, side_network_hidden


class StackedLinear(nn.Module):
    """Weights of one Linear for every level: `weight [L, out, in]`, `bias [L, out]`."""

    def __init__(self, levels: int, width_in: int, width_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, width_out, width_in) * std)
        self.bias = nn.Parameter(torch.zeros(levels, width_out))


class Tower(nn.Module):
    """Parameters of a tower: `down`, `up`, `gate`; `cross*` by other modality; `narrow` for unequal pairs.

    T_{n→m} ◊ starts variance-preserving (N(0, 1/D_n) then N(0, 1/r)); its gate ν starts at 0, so the network
    starts intra-modal.
    """

    def __init__(self, config: CrossanConfig, index: int, structure: SideNetworkStructure) -> None:
        super().__init__()
        spec, levels, rank = config.towers[index], config.num_levels, config.bottleneck
        self.down = StackedLinear(levels, spec.width, rank, config.adapter_std)
        self.up = StackedLinear(levels, rank, spec.width, config.adapter_std)
        self.gate = nn.Parameter(torch.zeros(levels))
        names = config.modality_names
        cross = {names[n]: torch.zeros(levels) for m, n in structure.cross_pairs if m == index}
        if cross:
            self.cross = nn.ParameterDict({name: nn.Parameter(value) for name, value in cross.items()})
        senders = [n for m, n in structure.projected_pairs if m == index]
        if senders:
            widths = {n: structure.widths[n] for n in senders}
            self.cross_down = nn.ParameterDict(
                {names[n]: nn.Parameter(torch.randn(rank, widths[n]) * widths[n] ** -0.5) for n in senders}
            )
            self.cross_up = nn.ParameterDict(
                {names[n]: nn.Parameter(torch.randn(spec.width, rank) * rank**-0.5) for n in senders}
            )
        if index in structure.narrowed_towers:
            wide = max(structure.widths[m] for m in spec.sources)
            self.narrow = StackedLinear(levels, wide, spec.width, wide**-0.5)


class SideNetwork(nn.ModuleDict):
    """All towers by name; called with states and heads it gives each tower's embedding."""

    def __init__(self, config: CrossanConfig) -> None:
        self.structure = SideNetworkStructure.of(config)
        super().__init__(
            {spec.name: Tower(config, t, self.structure) for t, spec in enumerate(config.towers)}
        )
        self.names = config.modality_names

    def weights(self, heads: nn.ModuleDict) -> SideNetworkWeights:
        """The op's weights, with the towers' heads, by the same names, as single Linears."""
        applied = [folded(heads[name]) for name in self]
        towers = [cast(Tower, own(tower)) for tower in self.values()]
        structure, names = self.structure, self.names
        narrowed = [towers[t] for t in structure.narrowed_towers]
        return SideNetworkWeights(
            down_weight=[own(t.down).weight for t in towers],
            down_bias=[own(t.down).bias for t in towers],
            up_weight=[own(t.up).weight for t in towers],
            up_bias=[own(t.up).bias for t in towers],
            gate=[t.gate for t in towers],
            head_weight=[weight for weight, _ in applied],
            head_bias=[bias for _, bias in applied],
            cross_gate=[towers[m].cross[names[n]] for m, n in structure.cross_pairs],
            cross_down=[towers[m].cross_down[names[n]] for m, n in structure.projected_pairs],
            cross_up=[towers[m].cross_up[names[n]] for m, n in structure.projected_pairs],
            pair_weight=[own(t.narrow).weight for t in narrowed],
            pair_bias=[own(t.narrow).bias for t in narrowed],
        )

    def forward(
        self,
        states: Sequence[Tensor],
        heads: nn.ModuleDict,
        *,
        ids: Tensor | None = None,
        scales: Sequence[Tensor] | None = None,
        present: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Embeddings `[N, T, d]`; see `crossan_fast.ops.side_network`."""
        return side_network(
            states,
            self.weights(heads),
            self.structure,
            ids=ids,
            scales=scales,
            present=present,
            backend=backend,
        )

    def hidden(
        self,
        states: Sequence[Tensor],
        heads: nn.ModuleDict,
        *,
        ids: Tensor | None = None,
        scales: Sequence[Tensor] | None = None,
        present: Tensor | None = None,
    ) -> list[Tensor]:
        """Each tower's last h `[N, D]`, which training never makes: by the reference, in plain torch."""
        return side_network_hidden(
            states, self.weights(heads), self.structure, ids=ids, scales=scales, present=present
        )
