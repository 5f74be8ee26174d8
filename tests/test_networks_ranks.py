"""Networks on devices and on many ranks."""

import warnings
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError, DeviceError

torch = pytest.importorskip("torch")
nn = torch.nn

from network_models import OwnForward, made  # noqa: E402
from test_networks_data import batches  # noqa: E402
from test_networks_operator import close, products  # noqa: E402
from thread_ranks import on_threads  # noqa: E402


def test_dtype_and_device_by_position_are_deprecated():
    model, loss, inputs, targets, _ = made("lenet", dtype=torch.float32)
    with pytest.warns(DeprecationWarning, match="by position"):
        op = gh.GGNOperator(model, loss, inputs, targets, np.float64)
    assert op.dtype == np.float64
    with pytest.warns(DeprecationWarning, match="by position"):
        op = gh.GGNOperator(model, loss, inputs, targets, np.float64, "cpu")
    assert (op.dtype, op.device) == (np.float64, "cpu")
    with pytest.raises(TypeError, match="by position, got 7"):
        gh.GGNOperator(model, loss, inputs, targets, np.float64, "cpu", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gh.GGNOperator(model, loss, inputs, targets)


@pytest.mark.parametrize("entries", ["root", "dense"])
def test_what_is_stored_can_be_moved(cupy: Any, entries: str):
    """Products, blocks, diagonal and sketches of it; products by torch need torch's CUDA."""
    model, loss, inputs, targets, _ = made("lenet")
    host = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
    there = gh.GGNOperator(model, loss, inputs, targets, entries=entries, device="cuda")
    assert there.device == "cuda"
    gh.testing.check_operator(there, products(host))
    gh.testing.check_operator(host.to("cuda"), products(host))
    np.testing.assert_array_equal(there.runs().permutation, host.runs().permutation)
    if not torch.cuda.is_available():
        refused(
            DeviceError,
            lambda: gh.GGNOperator(model, loss, inputs, targets, entries="none", device="cuda"),
            "a torch with CUDA", "entries='root'",
        )  # fmt: skip


@pytest.mark.parametrize("entries", ["root", "dense", "none"])
def test_compression_on_many_ranks(entries: str):
    """The nested form to the bits of one rank; low rank sums over the ranks."""
    model, loss, inputs, targets, _ = made("own forward", n=9)
    assert isinstance(model, OwnForward)
    op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
    v = np.random.default_rng(0).standard_normal(op.shape[0])
    for scheme in ("hss", "lowrank"):
        options = {"rtol": 1e-8, "leaf_size": 8, "max_rank": 39}
        alone = gh.compress(op, scheme, **options) @ v

        def run(comm: Any, scheme: str = scheme, options: Any = options) -> Any:
            return gh.compress(op, scheme, comm=comm, **options) @ v

        for size in (2, 3):
            for got in on_threads(size, run):
                if scheme == "hss":
                    np.testing.assert_array_equal(got, alone)
                close(got, alone)


def test_samples_are_shared_out_over_ranks():
    """CG with one right-hand side: each rank multiplies by its samples."""
    model, loss, inputs, targets, _ = made("lenet", n=9)
    op = gh.GGNOperator(model, loss, batches(inputs, targets)[:2], entries="none")
    b = np.random.default_rng(0).standard_normal(op.shape[0])
    want, info = gh.cg(op, b, damping=1e-2, rtol=1e-10)
    assert info.converged

    def run(comm: Any) -> Any:
        return gh.cg(op, b, damping=1e-2, rtol=1e-10, comm=comm)[0]

    for got in on_threads(3, run):
        close(got, want, 1e-8)


def test_ranks_that_choose_different_ways_are_told():
    """Their parts of the sum would not add up."""
    model, loss, inputs, targets, _ = made("lenet", n=9)
    ways = [
        gh.GGNOperator(model, loss, inputs, targets, entries=entries)
        for entries in ("root", "none")
    ]

    def solve(comm: Any) -> str:
        with pytest.raises(ArgumentError, match=r"op differs between ranks.*'root'.*'none'"):
            gh.cg(ways[comm.rank], np.ones(137), damping=1.0, comm=comm)
        with pytest.raises(ArgumentError, match=r"op differs between ranks.*'root'.*'none'"):
            gh.compress(ways[comm.rank], rtol=1e-2, leaf_size=16, comm=comm)
        return "told"

    assert on_threads(2, solve) == ["told", "told"]


def test_gram_vectors_are_those_of_one_rank():
    model, loss, inputs, targets, _ = made("lenet")
    for entries in ("root", "none"):
        op = gh.GGNOperator(model, loss, inputs, targets, entries=entries)
        want = op.gram_vectors(16, 5)
        for got in on_threads(3, lambda comm, op=op: op.gram_vectors(16, 5, comm)):
            close(got, want)
