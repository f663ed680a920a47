"""A modality's own basis: the few directions that hold nearly all of its states, and states as coordinates.

A model meets states with linear maps alone, so towers of width k see of coordinates `V c` all that towers of
width D see of the projected states `Vᵀ V c`. Nothing is centred here: the padding and absent rows stay zeros,
and the mean takes a direction for itself, unless it was taken away before (`crossan_fast.cache.centring`).

`V` are the leading eigenvectors of `Σ_l Σ_i c_il c_ilᵀ / E_l`, `E_l` the energy of level l: exact, and in as
much memory for any number of items, five matrices of D × D float64 (0.7 GB at D = 4,096). A randomized SVD
would read the rows as often and have no whole spectrum to find the size of a basis by. Squaring hides what is
below 1e-8 of the largest singular value, which no storage dtype keeps either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crossan_fast._checks import nearest
from crossan_fast.config import Modality

Chunks = Callable[[], Iterator[Tensor]]

# Of a modality's source: the share of each level's energy that its basis held when it was chosen.
ENERGY = "energy"


def project(states: Tensor, basis: Tensor) -> Tensor:
    """fp32 coordinates `[..., k]` of `states` `[..., D]` in `basis` `[k, D]`.

    In float64: a row's coordinates are then the same, whatever rows it is projected with.
    """
    return (states.double() @ basis.double().T).float()


def expand(coordinates: Tensor, basis: Tensor) -> Tensor:
    """fp32 `[..., D]`: what `project` kept of the states."""
    return (coordinates.double() @ basis.double()).float()


def digest(basis: Tensor) -> str:
    """SHA-256 of a basis: coordinates mean the same under the same one alone."""
    return hashlib.sha256(str(list(basis.shape)).encode() + basis.contiguous().numpy().tobytes()).hexdigest()


def asked_sizes(
    modalities: Sequence[Modality],
    bases: Mapping[str, Tensor],
    basis: int | Mapping[str, int] | None,
    energy: float | Mapping[str, float] | None,
) -> dict[str, int | float]:
    """By modality name, the dimensions (int) or the share of energy (float) asked for, checked.

    Args:
        bases: of modalities that are stored in one already.
        basis, energy: for all modalities, or for those named; one of the two, or neither.

    Raises:
        ValueError: naming the argument and the modality.
    """
    if basis is not None and energy is not None:
        raise ValueError(f"basis, energy: expected one of them, got basis={basis} and energy={energy}")
    what, given = ("energy", energy) if basis is None else ("basis", basis)
    if given is None:
        return {}
    known = {m.name: m for m in modalities}
    by_name = dict(given) if isinstance(given, Mapping) else dict.fromkeys(known, given)
    if not by_name:
        raise ValueError(f"{what}: expected a number, or at least one modality's, got {given}")
    for name, size in by_name.items():
        if name not in known:
            raise ValueError(
                f"{what}: unknown modality {name!r}, expected some of {list(known)}{nearest(name, known)}"
            )
        if name in bases:
            k, width = bases[name].shape
            raise ValueError(
                f"{what}: modality {name!r} is stored in a basis already, {k} of {width} dimensions; convert "
                "the cache of full width that it was made from"
            )
        _check_size(what, size, known[name])
    return by_name


def _check_size(what: str, size: int | float, modality: Modality) -> None:
    if what == "energy":
        expected, fits = "a share above 0 and below 1", isinstance(size, float) and 0 < size < 1
    else:
        expected = f"a number of dimensions from 1 to {modality.width - 1}, below its width"
        fits = type(size) is int and 1 <= size < modality.width
    if not fits:
        raise ValueError(f"{what}: modality {modality.name!r}: expected {expected}, got {size!r}")


def choose_basis(chunks: Chunks, modality: Modality, size: int | float) -> Tensor:
    """The orthonormal rows, fp32 `[k, D]`, that hold most of a modality's energy, all levels counting alike.

    Args:
        chunks: called twice; yields all rows `[n, L, D]`, finite, as many at a time as are to be in memory.
        size: k, or the share of energy that the least k is to hold.

    Raises:
        ValueError: no state is other than zero; a share that takes all D dimensions.
    """
    gram = _gram(chunks, modality)
    values, vectors = np.linalg.eigh(gram)
    if isinstance(size, float):
        held = np.cumsum(np.maximum(values[::-1], 0))
        k = int(np.searchsorted(held, size * held[-1])) + 1
        if k >= modality.width:
            raise ValueError(
                f"energy: modality {modality.name!r}: {size} of it takes all {modality.width} dimensions; "
                "expected less, or leave this modality out"
            )
        size = k
    basis = vectors[:, ::-1][:, :size].T
    # An eigenvector's sign is LAPACK's whim; here the largest number of each is positive.
    largest = np.abs(basis).argmax(axis=1)
    basis = basis * np.sign(np.take_along_axis(basis, largest[:, None], axis=1))
    return torch.from_numpy(np.ascontiguousarray(basis, dtype=np.float32))


def _gram(chunks: Chunks, modality: Modality) -> npt.NDArray[np.float64]:
    """`Σ_l Σ_i c_il c_ilᵀ / E_l`, `[D, D]`."""
    energies = torch.zeros(modality.levels, dtype=torch.float64)
    for block in chunks():
        energies += level_energies(block)
    if not energies.any():
        raise ValueError(f"basis: modality {modality.name!r} has no state other than zero to choose one by")
    scale = torch.where(energies > 0, energies.rsqrt(), 0)[:, None]
    gram = np.zeros((modality.width, modality.width))
    for block in chunks():
        rows = (block.double() * scale).reshape(-1, modality.width).numpy()
        gram += rows.T @ rows  # of a matrix and itself: NumPy computes one half
    return gram


def level_energies(block: Tensor) -> Tensor:
    """`Σ_i |c_il|²` of `[n, L, D]`: float64 `[L]`."""
    return block.double().square().sum(dim=(0, 2))
