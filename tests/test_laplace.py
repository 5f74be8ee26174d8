"""The Laplace approximation against dense float64."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    DtypeError,
    FileFormatError,
    NotPositiveDefiniteError,
    ShapeError,
)

torch = pytest.importorskip("torch")
from laplace_cases import (  # noqa: E402
    FORMS,
    LAYERS,
    LOSSES,
    PRIORS,
    SAMPLES,
    TIGHT,
    Dense,
    N,
    problem,
    rows_of,
)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_evidence_and_gradient(loss: str, prior: str):
    model, given, data = problem(loss)
    dense, at = Dense(model, loss, data), PRIORS[prior]
    posterior = gh.Laplace(model, given, data, at, **TIGHT)
    assert posterior.num_data == SAMPLES
    np.testing.assert_allclose(posterior.log_likelihood, dense.fit, rtol=1e-12)
    value, slopes = posterior.log_marginal_likelihood(gradient=True)
    np.testing.assert_allclose(value, dense.evidence(at), rtol=1e-10)
    other = {"number": 0.2, "layers": {"0": 3.0, "2": 0.1}, "every": 2.0}[prior]
    found = posterior.log_marginal_likelihood(other)
    np.testing.assert_allclose(found, dense.evidence(other), rtol=1e-10)
    step = 1e-5
    names = list(at) if prior == "layers" else [None]
    for name in names:

        def moved(e: float, name: Any = name) -> Any:
            return {**at, name: at[name] * np.exp(e)} if name else at * np.exp(e)

        slope = (dense.evidence(moved(step)) - dense.evidence(moved(-step))) / (2 * step)
        np.testing.assert_allclose(slopes[name] if name else slopes, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_forms(xp: ModuleType, form: str):
    """On every device: evidence, variance, covariance and samples of each form."""
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    device = "cpu" if xp is np else "cuda"
    options = {**TIGHT, **FORMS[form], "device": device}
    posterior = gh.Laplace(model, given, data, LAYERS, **options)
    assert (posterior.matrix.device, posterior.matrix.report.scheme) == (device, form)
    np.testing.assert_allclose(
        posterior.log_marginal_likelihood(), dense.evidence(LAYERS), rtol=1e-9
    )
    new = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = posterior.predict(new, covariance=True)
    want = dense.covariance(LAYERS, dense.jacobian(model, new))
    np.testing.assert_allclose(found.mean, model(new).detach(), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, want, rtol=1e-7, atol=1e-9)
    alone = posterior.predict(new).variance
    np.testing.assert_allclose(alone, want.diagonal(axis1=1, axis2=2), rtol=1e-7)
    np.testing.assert_allclose(found.variance, alone, rtol=1e-9)
    assert posterior.sample(2, seed=1).shape == (2, N)
    trace = np.trace(np.linalg.solve(dense.G + np.diag(rows_of(LAYERS)), dense.G))
    np.testing.assert_allclose(posterior.num_effective, trace, rtol=1e-8)


def test_samples_have_mean_and_covariance():
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    posterior = gh.Laplace(model, given, data, 2.0, **TIGHT)
    draws = posterior.sample(20_000, seed=0)
    assert draws.dtype == torch.float64
    assert torch.equal(draws[:3], gh.Laplace(model, given, data, 2.0, **TIGHT).sample(20_000)[:3])
    inverse = np.linalg.inv(dense.G + 2 * np.eye(N))
    np.testing.assert_allclose(draws.mean(0), dense.theta, atol=5 / np.sqrt(2 * 20_000))
    off = np.linalg.norm(np.cov(draws.numpy().T) - inverse) / np.linalg.norm(inverse)
    assert off < 0.1


def test_default_tolerance_is_near():
    """What a user gets who gives nothing."""
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    for prior in (1.0, 0.05):
        posterior = gh.Laplace(model, given, data, prior)
        off = posterior.log_marginal_likelihood() - dense.evidence(prior)
        assert abs(off) < 0.1
        assert posterior.matrix.report.spectral_error <= 0.11 * prior


@pytest.mark.parametrize("structure", ["scalar", "layer", None])
def test_optimized_prior(structure: str | None):
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    start: Any = 1.0 + np.arange(N) / N if structure is None else 5.0
    posterior = gh.Laplace(model, given, data, start, **TIGHT)
    before = posterior.log_marginal_likelihood()
    found = posterior.optimize_prior_precision(structure, rtol=1e-6)
    np.testing.assert_array_equal(rows_of(found), rows_of(posterior.prior_precision))
    value = posterior.log_marginal_likelihood()
    assert value >= before
    np.testing.assert_allclose(value, dense.evidence(found), rtol=1e-9)
    steps = [0.99, 1.01]
    if structure == "layer":
        near = [{**found, name: s * found[name]} for s in steps for name in found]
    else:
        near = [s * found for s in steps]
    assert all(dense.evidence(other) < value for other in near)


@pytest.mark.parametrize("start", [100.0, 1e-3])
def test_the_way_to_the_best_prior_is_short(monkeypatch: pytest.MonkeyPatch, start: float):
    """A line search from afar tried 1e-6, which float32 cannot do, and 1e8."""
    model, given, data = problem(dtype=torch.float32)
    posterior = gh.Laplace(model, given, data, start, leaf_size=10)
    tried, factor = [], type(posterior.matrix).factorize
    monkeypatch.setattr(
        type(posterior.matrix), "factorize", lambda K, d: tried.append(d) or factor(K, d)
    )
    found = posterior.optimize_prior_precision()
    np.testing.assert_allclose(found, 2.8685, rtol=1e-2)  # of float64
    assert min(tried) >= min(start, found) / 10
    assert max(tried) <= max(start, found) * 10


def test_a_prior_too_small_for_the_matrix_is_not_where_the_search_ends():
    model, given, data = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = gh.Laplace(model, given, data, 10.0, "hss", max_rank=5, leaf_size=4)
    with pytest.warns(AccuracyWarning) as said:
        found = posterior.optimize_prior_precision()
    assert 2.15 < found < 10  # the smallest eigenvalue of the compressed matrix is -2.15
    assert any("is not positive definite: give dtype" in str(w.message) for w in said)
    assert posterior.prior_precision == found


def test_last_layer_and_subsets():
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    posterior = gh.Laplace(model, given, data, 1.3, params=["2.weight", "2.bias"], **TIGHT)
    own = slice(35, None)
    G, theta = dense.G[own, own], dense.theta[own]
    want = dense.fit - 0.65 * theta @ theta + 0.5 * 18 * np.log(1.3)
    want -= 0.5 * np.linalg.slogdet(G + 1.3 * np.eye(18))[1]
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), want, rtol=1e-10)
    J = dense.J[:5, :, own]
    inverse = np.linalg.inv(G + 1.3 * np.eye(18))
    np.testing.assert_allclose(
        posterior.predict(data[0][:5]).variance,
        np.einsum("ndp,pq,ndq->nd", J, inverse, J),
        rtol=1e-8,
    )
    assert posterior.sample(3).shape == (3, 18)
    with pytest.raises(ArgumentError, match="'0' is no layer"):
        posterior.log_marginal_likelihood({"0": 1.0, "2": 1.0})


def test_probabilities():
    model, given, data = problem()
    posterior = gh.Laplace(model, given, data, 0.3, **TIGHT)
    new = 2 * data[0][:3]
    probit = posterior.predict(new)
    scaled = probit.mean / torch.sqrt(1 + math.pi / 8 * probit.variance)
    np.testing.assert_allclose(probit.probabilities, torch.softmax(scaled, 1), rtol=1e-12)
    drawn = posterior.predict(new, link="mc", num_samples=20_000, covariance=True)
    root = np.linalg.cholesky(drawn.covariance.numpy())
    z = np.random.default_rng(0).standard_normal((20_000, 3, 3))
    f = drawn.mean.numpy() + np.einsum("nde,kne->knd", root, z)
    want = np.exp(f) / np.exp(f).sum(-1, keepdims=True)
    np.testing.assert_allclose(drawn.probabilities, want.mean(0), atol=0.02)
    assert posterior.predict(new, link=None).probabilities is None
    sure = torch.softmax(probit.mean, 1).amax(1)
    assert bool((probit.probabilities.amax(1) < sure).all())


def test_binary_probabilities_and_none():
    model, given, data = problem("binary")
    found = gh.Laplace(model, given, data, 0.3, **TIGHT).predict(data[0][:3])
    scaled = found.mean / torch.sqrt(1 + math.pi / 8 * found.variance)
    np.testing.assert_allclose(found.probabilities, scaled.sigmoid(), rtol=1e-12)
    model, given, data = problem("mse")
    posterior = gh.Laplace(model, given, data, **TIGHT)
    assert posterior.predict(data[0]).probabilities is None
    with pytest.raises(ArgumentError, match="for losses with classes"):
        posterior.predict(data[0], link="probit")


def test_batches_are_the_whole():
    model, given, (inputs, targets) = problem()
    whole = gh.Laplace(model, given, (inputs, targets), **TIGHT)
    batches = [(inputs[:11], targets[:11]), (inputs[11:], targets[11:])]
    parts = gh.Laplace(model, given, batches, **TIGHT)
    np.testing.assert_allclose(
        parts.log_marginal_likelihood(), whole.log_marginal_likelihood(), rtol=1e-10
    )
    assert parts.num_data == SAMPLES


def test_mean_reduction_is_summed():
    model, _, data = problem()
    mean = gh.Laplace(model, torch.nn.CrossEntropyLoss(), data, **TIGHT)
    total = gh.Laplace(model, torch.nn.CrossEntropyLoss(reduction="sum"), data, **TIGHT)
    assert mean.log_marginal_likelihood() == total.log_marginal_likelihood()


def test_fit_takes_the_new_weights_and_keeps_the_prior():
    model, given, data = problem()
    posterior = gh.Laplace(model, given, data, 1.0, **TIGHT)
    posterior.prior_precision = 0.4
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.5
    want = Dense(model, "cross_entropy", data).evidence(0.4)
    assert abs(posterior.log_marginal_likelihood() - want) > 0.1
    np.testing.assert_allclose(posterior.fit().log_marginal_likelihood(), want, rtol=1e-10)


@pytest.mark.parametrize("num_probes", [N, 20])
def test_error_of_the_evidence(num_probes: int):
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    few = {"scheme": "lowrank", "tail": "none", "max_rank": N}
    posterior = gh.Laplace(model, given, data, 1.0, **few)
    off, error = posterior.evidence_error(num_probes)
    wanted = posterior.log_marginal_likelihood() - dense.evidence(1.0)
    assert wanted > 1e-3
    assert (error == 0) == (num_probes == N)
    assert abs(off - wanted) < 4 * error + 0.1 * wanted


def test_a_smaller_prior_compresses_again():
    model, given, data = problem()
    dense = Dense(model, "cross_entropy", data)
    options = {"scheme": "hss", "leaf_size": 10, "max_rank": N}
    posterior = gh.Laplace(model, given, data, 10.0, **options)
    first = posterior.matrix
    posterior.log_marginal_likelihood(100.0)
    assert posterior.matrix is first
    value = posterior.log_marginal_likelihood(1e-3)
    assert posterior.matrix is not first
    assert posterior.matrix.report.spectral_error <= 1.1e-4
    np.testing.assert_allclose(value, dense.evidence(1e-3), rtol=1e-4)


def said(call: Callable[[], Any]) -> str:
    """All that is warned of; what this class warns of names the user's line."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    own = [w for w in found if str(w.message).startswith("the Gauss-Newton")]
    assert [w.filename for w in own] == [__file__]
    return "; ".join(str(w.message) for w in found if issubclass(w.category, AccuracyWarning))


def test_a_rank_cap_is_not_silent():
    model, given, data = problem()
    few = {"scheme": "lowrank", "max_rank": 5, "tail": "none"}
    found = said(lambda: gh.Laplace(model, given, data, 1e-2, **few))
    assert "a tenth of the smallest prior precision, 0.01" in found
    assert "may be off; raise max_rank" in found
    narrow, given, data = problem(dtype=torch.float32)
    found = said(lambda: gh.Laplace(narrow, given, data, 1e-5, leaf_size=10))
    assert "may be off; give dtype=torch.float64" in found  # no rank does more than float32


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.RankCapWarning")
def test_an_indefinite_matrix_is_refused():
    model, given, data = problem()
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
        gh.Laplace(model, given, data, 1e-2, "hss", max_rank=5, leaf_size=4)


@pytest.mark.parametrize("prior", PRIORS)
def test_saved_and_loaded(tmp_path: Path, prior: str):
    model, given, data = problem()
    posterior = gh.Laplace(model, given, data, PRIORS[prior], **TIGHT)
    path = tmp_path / "posterior.npz"
    posterior.save(path)
    again = gh.Laplace.load(path, model)
    np.testing.assert_array_equal(rows_of(again.prior_precision), rows_of(PRIORS[prior]))
    assert again.log_marginal_likelihood() == posterior.log_marginal_likelihood()
    assert torch.equal(again.sample(2, seed=4), posterior.sample(2, seed=4))
    one, two = (p.predict(data[0][:4], link="mc", seed=2) for p in (posterior, again))
    assert torch.equal(one.probabilities, two.probabilities)
    assert torch.equal(one.variance, two.variance)
    with pytest.raises(ArgumentError, match="no data to be made of again"):
        again.fit()
    with pytest.raises(ArgumentError, match="no data to be compared"):
        again.evidence_error()
    assert gh.load(path).shape == (N, N)


def test_a_file_is_of_one_network(tmp_path: Path):
    model, given, data = problem()
    path = tmp_path / "posterior.npz"
    gh.Laplace(model, given, data, **TIGHT).save(path)
    with pytest.raises(ArgumentError, match="not those that the posterior was made of"):
        gh.Laplace.load(path, model, params=["2.weight"])
    with torch.no_grad():
        model[0].bias[0] += 1e-9
    with pytest.raises(ArgumentError, match="its weights"):
        gh.Laplace.load(path, model)
    gh.compress(np.eye(4)).save(path)
    with pytest.raises(FileFormatError, match="no posterior"):
        gh.Laplace.load(path, model)


def test_a_loaded_one_says_what_it_cannot(tmp_path: Path):
    model, given, data = problem()
    path = tmp_path / "posterior.npz"
    options = {"scheme": "lowrank", "tail": "none", "max_rank": N}
    gh.Laplace(model, given, data, 5.0, **options).save(path)
    again = gh.Laplace.load(path, model)
    assert again.matrix.report.spectral_error > 1e-5
    found = said(lambda: again.log_marginal_likelihood(1e-5))
    assert "a loaded posterior has no data" in found


def test_float32():
    model, given, data = problem(dtype=torch.float32)
    options = {"scheme": "hss", "leaf_size": 10, "max_rank": N}
    posterior = gh.Laplace(model, given, data, 1.0, **options)
    assert posterior.matrix.dtype == np.float32
    assert posterior.sample(1).dtype == torch.float32
    wide = gh.Laplace(model, given, data, 1.0, dtype=np.float64, **TIGHT)
    np.testing.assert_allclose(
        posterior.log_marginal_likelihood(), wide.log_marginal_likelihood(), rtol=1e-3
    )


BAD_PRIORS: dict[str, tuple[Any, type[Exception], str]] = {
    "zero": (0.0, ArgumentError, "> 0"),
    "negative": (-1.0, ArgumentError, "> 0"),
    "nan": (math.nan, ArgumentError, "finite"),
    "a word": ("one", DtypeError, "real number"),
    "a layer is left out": ({"0": 1.0}, ArgumentError, "but not 2.weight"),
    "another layer": ({**LAYERS, "5": 1.0}, ArgumentError, "'5' is no layer"),
    "nothing": ({}, ArgumentError, "names nothing"),
    "a layer's is negative": ({"0": 1.0, "2": -1.0}, ArgumentError, "prior_precision\\['2'\\]"),
    "too short": (np.ones(5), ShapeError, "\\(53,\\)"),
    "a zero in it": (np.arange(53.0), ArgumentError, "> 0"),
    "an infinity in it": (np.full(53, np.inf), ArgumentError, "infinite"),
}


@pytest.mark.parametrize("bad", BAD_PRIORS)
def test_bad_priors(bad: str):
    model, given, data = problem()
    prior, error, match = BAD_PRIORS[bad]
    with pytest.raises(error, match=match):
        gh.Laplace(model, given, data, prior, **TIGHT)


def test_bad_arguments():
    model, given, data = problem()
    for options, match in (
        ({"damping": 1.0}, "the prior's precision"),
        ({"comm": 3}, "comm"),
        ({"max_rank": 0}, "max_rank"),
        ({"scheme": "best"}, "scheme"),
        ({"entries": "all"}, "entries"),
        ({"params": ["9.weight"]}, "no parameter"),
    ):
        with pytest.raises((ArgumentError, DtypeError), match=match):
            gh.Laplace(model, given, data, **options)
    with pytest.raises(ShapeError, match="must be a pair"):
        gh.Laplace(model, given, (*data, data[0]))
    posterior = gh.Laplace(model, given, data, **TIGHT)
    for call, error in (
        (lambda: posterior.sample(0), ArgumentError),
        (lambda: posterior.predict(data[0], link="logit"), ArgumentError),
        (lambda: posterior.predict(data[0], num_samples=0), ArgumentError),
        (lambda: posterior.evidence_error(1), ArgumentError),
        (lambda: posterior.predict("x"), DtypeError),
        (lambda: posterior.predict(data[0][:, :5]), ArgumentError),
        (lambda: posterior.predict(data[0][:0]), ShapeError),
        (lambda: posterior.predict(data[0] * math.nan), ArgumentError),
        (lambda: posterior.optimize_prior_precision("tensor"), ArgumentError),
        (lambda: posterior.optimize_prior_precision(bounds=(1.0, 0.1)), ArgumentError),
        (lambda: posterior.optimize_prior_precision(bounds=3.0), DtypeError),
        (lambda: posterior.optimize_prior_precision(rtol=0.0), ArgumentError),
        (lambda: setattr(posterior, "prior_precision", -1.0), ArgumentError),
    ):
        with pytest.raises(error):
            call()


def test_a_bound_is_not_silent():
    model, given, data = problem()
    posterior = gh.Laplace(model, given, data, 1.0, **TIGHT)
    with pytest.warns(AccuracyWarning, match="ended at a bound"):
        found = posterior.optimize_prior_precision(bounds=(1e3, 1e4))
    assert np.isclose(found, 1e3)


def test_ranks_have_what_one_has(tmp_path: Path):
    """Evidence, gradient, samples, predictions and files of many ranks."""
    trained, given, data = problem()
    path = tmp_path / "posterior.npz"

    def run(comm: Any) -> Any:
        model = copy.deepcopy(trained)  # a rank's own, as processes have it
        posterior = gh.Laplace(model, given, data, LAYERS, comm=comm, **TIGHT)
        prior = posterior.optimize_prior_precision(rtol=1e-6)
        value, slopes = posterior.log_marginal_likelihood(LAYERS, gradient=True)
        found = posterior.predict(data[0][:3], link="mc", num_samples=10)
        posterior.save(path)
        again = gh.Laplace.load(path, model, comm=comm).log_marginal_likelihood()
        assert again == posterior.log_marginal_likelihood()
        numbers = [value, *slopes.values(), *prior.values(), again]
        return np.array(numbers), found.probabilities.numpy(), posterior.sample(2).shape

    alone = run(None)
    every = on_threads(2, run)
    assert not [x for x in every if isinstance(x, Exception)]
    np.testing.assert_array_equal(every[0][0], every[1][0])
    np.testing.assert_array_equal(every[0][1], every[1][1])
    for numbers, probabilities, shape in every:
        np.testing.assert_allclose(numbers, alone[0], rtol=1e-8)
        np.testing.assert_allclose(probabilities, alone[1], rtol=1e-8)
        assert shape == (2, N)


def test_ranks_must_agree():
    trained, given, data = problem()

    def run(comm: Any) -> None:
        gh.Laplace(copy.deepcopy(trained), given, data, 1.0 + comm.rank, comm=comm, **TIGHT)

    for found in on_threads(2, run):
        assert isinstance(found, ArgumentError)
        assert "prior_precision" in str(found)
