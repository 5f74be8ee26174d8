"""Padded slots hold exact zeros, whatever made the form: a factor is that of its own matrix."""

from types import ModuleType

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.compressed.weak_form import weak_form
from gpu_hodlr.devices import to_host
from gpu_hodlr.structures import HODLR, Multipole, Structure, Telescope

FORMS: list[tuple[str, str, float]] = [
    *(("hss", sampler, 0.0) for sampler in ("products", "products+entries", "entries")),
    *(("fmm", sampler, 0.3) for sampler in ("products+entries", "entries")),
    *(("hodlr", sampler, 0.0) for sampler in ("products", "products+entries", "entries")),
]


def exact(n: int) -> np.ndarray:
    """Halves that are weakly coupled, of full rank."""
    a = np.random.default_rng(0).standard_normal((n, 140))
    H = a @ a.T / 140 + 0.5 * np.eye(n)
    H[: n // 2, n // 2 :] *= 0.1
    H[n // 2 :, : n // 2] *= 0.1
    return H


def padded_entries(form: Structure) -> list[np.ndarray]:
    """What D, T and B hold in padded rows and columns, level by level; U of HODLR."""
    padding = to_host(form.all_leaves) < 0
    D = to_host(form.arrays()[0])
    found = [D[padding], D.swapaxes(1, 2)[padding]]
    if isinstance(form, HODLR):
        return [*found, to_host(form.U)[padding.ravel()]]
    assert isinstance(form, (Telescope, Multipole))
    for i, level in enumerate(form.levels):
        if level.order is not None:
            padding = np.take_along_axis(padding, to_host(level.order), axis=1)
        kept, rest, T, B = padding[:, : level.rank], padding[:, level.rank :], level.T, level.B
        nodes = np.arange(len(kept)).reshape(-1, 2)
        pairs = nodes if isinstance(form, Telescope) else form.far_pairs[i]
        T, B = to_host(T), to_host(B)
        found += [T[rest], T.swapaxes(1, 2)[kept]]
        found += [B[kept[pairs[:, 0]]], B.swapaxes(1, 2)[kept[pairs[:, 1]]]]
        padding = kept.reshape(-1, 2 * level.rank)
    return found


@pytest.mark.parametrize("n", [126, 128, 100, 70])
@pytest.mark.parametrize(("scheme", "sampler", "budget"), FORMS)
def test_padded_slots_are_zero(xp: ModuleType, scheme: str, sampler: str, budget: float, n: int):
    K = gh.compress(
        xp.asarray(exact(n)), scheme, rtol=1e-2, leaf_size=32, ordering="natural", budget=budget,
        sampler=sampler,
    )  # fmt: skip
    forms = [K.structure]
    if isinstance(K.structure, Multipole):
        forms.append(weak_form(K.structure, 1e-2, n))
    for form in forms:
        assert not any(a.any() for a in padded_entries(form))
    if scheme != "fmm":
        W = to_host(K.factorize(1.0).sqrt_matmat(xp.eye(n)))
        want = to_host(K.to_dense()) + np.eye(n)
        np.testing.assert_allclose(W @ W.T, want, rtol=0, atol=1e-13)
