"""The kernels of pivoted Cholesky factorization, executed on the host."""

from __future__ import annotations

import numpy as np
import pytest
from host_cuda import factor_launches, runner
from kernel_cases import built_for_host, needs_compiler, under_schedules

pytestmark = needs_compiler


@pytest.fixture(scope="session")
def on_host(host_library_folder) -> dict[str, runner.HostKernels]:
    return built_for_host(host_library_folder, ("pivoted_cholesky",))


def one_by_one(gram: np.ndarray, stop: float, most: int) -> tuple[list[int], np.ndarray]:
    """Columns chosen and rows of R, one after the other: the largest of what is left."""
    left, chosen, rows = gram.copy(), [], np.zeros((0, len(gram)))
    while len(chosen) < most:
        diagonal = left.diagonal().copy()
        diagonal[chosen] = 0
        if diagonal.sum() <= stop or not diagonal.max() > 0:
            break
        pivot = int(diagonal.argmax())
        row = left[pivot] / np.sqrt(left[pivot, pivot])
        row[chosen] = 0
        left -= np.outer(row, row)
        chosen.append(pivot)
        rows = np.vstack([rows, row])
    return chosen, rows


def samples(case: str, m: int, s: int) -> np.ndarray:
    rng = np.random.default_rng(m)
    S = rng.standard_normal((2, m, s)) * 10.0 ** -rng.uniform(0, 2, (2, m, 1))
    if case == "deficient":
        S = S @ np.linalg.qr(rng.standard_normal((s, max(1, s // 3))))[0] @ np.eye(s // 3, s)
    if case == "padded":
        S[0, 1::2] = 0
        S[1] = 0
    return S


@pytest.mark.parametrize("case", ["full", "deficient", "padded"])
@pytest.mark.parametrize(
    ("m", "s", "threads"), [(1, 3, 32), (40, 50, 64), (75, 70, 96), (90, 60, 768), (33, 4, 32)]
)
def test_factors(on_host, case: str, m: int, s: int, threads: int) -> None:
    S = samples(case, m, s)
    gram, steps = S @ S.swapaxes(1, 2), min(m, s)
    stop = 1e-10 * np.trace(gram, axis1=1, axis2=2)
    pivots, r, ranks = under_schedules(
        factor_launches.pivoted_cholesky, on_host["pivoted_cholesky"], gram, stop, steps, steps,
        threads=threads,
    )  # fmt: skip
    for t in range(2):
        chosen, rows = one_by_one(gram[t], stop[t], steps)
        others = np.setdiff1d(np.arange(m), chosen)
        assert ranks[t] == len(chosen)
        np.testing.assert_array_equal(pivots[t], [*chosen, *others])
        np.testing.assert_allclose(
            r[t, : len(chosen)], np.triu(rows[:, pivots[t]]), rtol=0,
            atol=1e-9 * np.sqrt(stop[t] * 1e10),
        )  # fmt: skip
        assert not r[t, len(chosen) :].any()
        assert not np.tril(r[t], -1).any()


def test_equal_columns_are_taken_from_the_first(on_host) -> None:
    gram = np.broadcast_to(np.eye(70), (1, 70, 70)).copy()
    pivots, r, ranks = factor_launches.pivoted_cholesky(
        on_host["pivoted_cholesky"], gram, np.zeros(1), 70, 70
    )
    np.testing.assert_array_equal(pivots, np.arange(70)[None])
    np.testing.assert_array_equal(r, gram)
    assert ranks == 70


@pytest.mark.parametrize("most", [0, 5, 32, 37])
def test_no_more_pivots_than_asked_for(on_host, most: int) -> None:
    S = samples("full", 50, 60)
    gram = S @ S.swapaxes(1, 2)
    pivots, r, ranks = factor_launches.pivoted_cholesky(
        on_host["pivoted_cholesky"], gram, np.zeros(2), most, 50
    )
    np.testing.assert_array_equal(ranks, most)
    assert not r[:, most:].any()
    for t in range(2):
        np.testing.assert_array_equal(pivots[t, :most], one_by_one(gram[t], 0.0, most)[0])
        np.testing.assert_array_equal(pivots[t, most:], np.sort(pivots[t, most:]))


def test_a_node_ends_by_itself(on_host) -> None:
    """After no, a few, and more than a panel's pivots; the others go on."""
    S = samples("full", 60, 70)[:1].repeat(3, axis=0)
    gram = S @ S.swapaxes(1, 2)
    trace = float(np.trace(gram[0]))
    stop = np.array([2 * trace, 0.1 * trace, 1e-5 * trace])
    _, _, ranks = factor_launches.pivoted_cholesky(on_host["pivoted_cholesky"], gram, stop, 60, 60)
    assert ranks[0] == 0
    assert 0 < ranks[1] < 32 < ranks[2] < 60
    for t in range(3):
        alone = factor_launches.pivoted_cholesky(
            on_host["pivoted_cholesky"], gram[t : t + 1], stop[t : t + 1], 60, 60
        )
        together = factor_launches.pivoted_cholesky(on_host["pivoted_cholesky"], gram, stop, 60, 60)
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a[0], b[t])


def test_nan_is_no_pivot(on_host) -> None:
    gram = np.stack([np.eye(40), np.eye(40)])
    gram[0, 3, 3] = np.nan
    _, r, ranks = factor_launches.pivoted_cholesky(
        on_host["pivoted_cholesky"], gram, np.zeros(2), 40, 40
    )
    assert np.isfinite(r[1]).all()
    assert ranks[1] == 40
