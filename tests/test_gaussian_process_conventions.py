"""Gaussian processes as others use them: any library, ranks, scikit-learn's conventions."""

import pickle
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from process_cases import AT, LENGTHS, NEW, ROWS, TIGHT, M, N, X, Y, exact, fixed
from test_bad_input import refused
from test_package import python
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError


def test_arrays_of_any_library(xp: ModuleType):
    wanted = fixed().fit(X, Y)
    process = fixed().fit(xp.asarray(X), xp.asarray(Y))
    found, std = process.predict(xp.asarray(NEW), return_std=True)
    assert isinstance(found, xp.ndarray)
    assert isinstance(std, xp.ndarray)
    mean, spread = wanted.predict(NEW, return_std=True)
    np.testing.assert_allclose(to_host(found), mean, rtol=1e-8)
    np.testing.assert_allclose(to_host(std), spread, rtol=1e-6)
    _, covariance = process.predict(xp.asarray(NEW), return_cov=True)
    np.testing.assert_allclose(to_host(covariance), exact(Y, 0.01)[1], atol=1e-9)
    sample = process.sample_y(xp.asarray(NEW), 3)
    assert isinstance(sample, xp.ndarray)
    rows = fixed(noise=xp.asarray(ROWS), optimizer="newton", max_iter=2, subset=30)
    assert rows.fit(xp.asarray(X), xp.asarray(Y)).noise_.shape == (N,)


def test_a_device_that_all_goes_to(cupy: ModuleType):
    process = fixed(device="cuda").fit(X, Y)
    assert process.factor_.device == "cuda"
    found, std = process.predict(NEW, return_std=True)
    assert isinstance(found, np.ndarray)
    assert isinstance(std, np.ndarray)
    np.testing.assert_allclose(found, exact(Y, 0.01)[0], rtol=1e-8)
    assert process.sample_y(NEW).shape == (M, 1)
    assert 0.9 < process.score(X, Y) < 1
    there = fixed().fit(cupy.asarray(X), cupy.asarray(Y))
    refused(DeviceError, lambda: there.predict(NEW), "X is on cpu, the process on cuda")
    refused(DeviceError, lambda: fixed().fit(cupy.asarray(X), Y), "y is on cpu")


def test_torch_lists_and_frames():
    mean = fixed().fit(X, Y).predict(NEW)
    np.testing.assert_array_equal(fixed().fit(X.tolist(), Y.tolist()).predict(NEW.tolist()), mean)
    integers = fixed().fit((10 * X).astype(int), Y)
    assert np.isfinite(integers.predict(np.ones((2, 2), np.int32))).all()
    torch = pytest.importorskip("torch")
    process = fixed().fit(torch.from_numpy(X), torch.from_numpy(Y))
    found = process.predict(torch.from_numpy(NEW), return_std=True)
    assert all(isinstance(x, torch.Tensor) for x in found)
    np.testing.assert_allclose(found[0].numpy(), mean)


def test_names_of_features():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["east", "north"])
    process = fixed().fit(frame, pandas.Series(Y))
    assert list(process.feature_names_in_) == ["east", "north"]
    assert process.n_features_in_ == 2
    assert isinstance(process.predict(frame), np.ndarray)
    refused(ArgumentError, lambda: process.predict(frame[["north", "east"]]), "['north', 'east']")
    process.fit(X, Y)
    assert not hasattr(process, "feature_names_in_")


def test_ranks():
    """The same bits but for a variance's, which is a sum over them."""
    options: dict[str, Any] = {
        "compress_options": {"leaf_size": 10}, "rtol": 1e-10, "num_probes": 8, "lengthscale": 0.5,
        "variance": 1.0, "noise": 0.05, "max_iter": 3,
    }  # fmt: skip

    def found(comm: Any = None) -> dict[str, Any]:
        process = gh.GaussianProcess(comm=comm, **options).fit(X, Y)
        mean, std = process.predict(NEW, return_std=True)
        return {
            "theta": process.theta_, "mean": mean, "std": std, "sample": process.sample_y(NEW, 3),
            "covariance": process.predict(NEW, return_cov=True)[1],
        }  # fmt: skip

    alone = found()
    for size in (2, 3):
        for theirs in on_threads(size, found):
            assert not isinstance(theirs, Exception), theirs
            np.testing.assert_allclose(theirs.pop("std"), alone["std"], rtol=1e-12)
            for name, value in theirs.items():
                np.testing.assert_array_equal(value, alone[name], name)


def test_ranks_that_differ():
    def other(comm: Any) -> Any:
        return fixed(comm=comm, compress_options={"leaf_size": 10}).fit(X + 1e-3 * comm.rank, Y)

    def fewer(comm: Any) -> Any:
        process = fixed(comm=comm, compress_options={"leaf_size": 10}).fit(X, Y)
        return process.predict(NEW[: M - comm.rank])

    for function, words in ((other, "X differs between ranks"), (fewer, "X differs between ranks")):
        for error in on_threads(2, function):
            assert isinstance(error, ArgumentError)
            assert words in str(error)


def test_estimator_checks_of_scikit_learn():
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is no subclass of theirs
        found = checks.check_estimator(gh.GaussianProcess(max_iter=5), on_fail=None, on_skip=None)
    bad = {f["check_name"]: f["exception"] for f in found if f["status"] == "failed"}
    assert not bad
    skipped = {f["check_name"] for f in found if f["status"] == "skipped"}
    assert skipped <= {"check_array_api_input"}
    assert len(found) > 40


def test_clones_pipelines_and_searches():
    sklearn = pytest.importorskip("sklearn")
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    process = fixed().fit(X, Y)
    twin = sklearn.base.clone(process)
    assert twin.get_params().keys() == process.get_params().keys()
    assert not hasattr(twin, "theta_")
    pipeline = make_pipeline(StandardScaler(), gh.GaussianProcess(normalize_y=True)).fit(X, Y)
    assert pipeline.score(X, Y) > 0.97
    search = GridSearchCV(fixed(), {"kernel": ["laplace", "matern52"]}, cv=3).fit(X, Y)
    assert search.best_params_["kernel"] == "matern52"
    assert sklearn.base.is_regressor(process)


def test_parameters_by_name():
    process = gh.GaussianProcess("laplace", noise=0.1)
    assert process.get_params()["kernel"] == "laplace"
    assert process.set_params(noise=0.2, kernel="matern32") is process
    assert repr(process) == "GaussianProcess(kernel='matern32', noise=0.2)"
    assert repr(gh.GaussianProcess(lengthscale=LENGTHS)).startswith("GaussianProcess(lengthscale=a")
    refused(ArgumentError, lambda: process.set_params(lenghtscale=1), "'lenghtscale'")


def test_pickles():
    process = fixed().fit(X, Y)
    again = pickle.loads(pickle.dumps(process))
    np.testing.assert_array_equal(again.predict(NEW), process.predict(NEW))


def test_scores():
    process = fixed().fit(X, Y)
    rest = Y - process.predict(X)
    assert process.score(X, Y) == pytest.approx(1 - rest @ rest / ((Y - Y.mean()) ** 2).sum())
    weights = np.linspace(0, 1, N)
    average = weights @ Y / weights.sum()
    want = 1 - weights @ rest**2 / (weights @ (Y - average) ** 2)
    assert process.score(X, Y, weights) == pytest.approx(want)


def test_a_column_of_targets_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="A column-vector y was passed"):
        process = fixed().fit(X, Y[:, None])
    np.testing.assert_array_equal(process.predict(NEW), fixed().fit(X, Y).predict(NEW))


BAD: dict[str, tuple[type[Exception], dict[str, Any], dict[str, Any], str]] = {
    "one sample": (ShapeError, {}, {"X": X[:1], "y": Y[:1]}, "two samples at least, got 1 sample"),
    "no samples": (ShapeError, {}, {"X": X[:0], "y": Y[:0]}, "0 sample(s)"),
    "a line": (ShapeError, {}, {"X": X[:, 0]}, "Reshape your data"),
    "other lengths": (ShapeError, {}, {"y": Y[1:]}, "y must have shape (80,)"),
    "two targets": (ShapeError, {}, {"y": X}, "y must have shape (80,)"),
    "NaN": (ArgumentError, {}, {"X": X * np.nan}, "X has 160 entries that are NaN"),
    "infinite y": (ArgumentError, {}, {"y": Y * np.inf}, "y has 80 entries"),
    "no y": (ArgumentError, {}, {"y": None}, "y is None"),
    "complex": (ArgumentError, {}, {"X": X + 1j}, "Complex data not supported"),
    "words": (ArgumentError, {}, {"X": np.full((N, 2), "a")}, "X must be numbers"),
    "kernel": (ArgumentError, {"kernel": "cubic"}, {}, "kernel must be one of"),
    "length scales": (ShapeError, {"lengthscale": np.ones(3)}, {}, "lengthscale must be a number"),
    "a word": (ArgumentError, {"lengthscale": "ard"}, {}, "'auto', 'each', a number or (2,)"),
    "variance": (ArgumentError, {"variance": -1.0}, {}, "variance must be > 0"),
    "no noise": (ArgumentError, {"noise": 0.0}, {}, "noise must be > 0"),
    "noise of some": (ShapeError, {"noise": ROWS[1:]}, {}, "noise must be a number or (80,)"),
    "a noise of 0": (ArgumentError, {"noise": ROWS * 0}, {}, "noise must be > 0 everywhere"),
    "noise < 0": (ArgumentError, {"noise": (-ROWS).tolist()}, {}, "noise must be > 0"),
    "a bound": (DtypeError, {"noise_bounds": 3.0}, {}, "noise_bounds must be a pair"),
    "outside": (ArgumentError, {"variance_bounds": (2.0, 3.0)}, {}, "must have 1.5 between"),
    "optimizer": (ArgumentError, {"optimizer": "adam"}, {}, "optimizer must be one of"),
    "restarts": (ArgumentError, {"n_restarts_optimizer": -1}, {}, "n_restarts_optimizer must be"),
    "subset": (ArgumentError, {"subset": 1}, {}, "subset must be >= 2"),
    "tol": (ArgumentError, {"tol": -1.0}, {}, "tol must be >= 0"),
    "probes": (ArgumentError, {"num_probes": 1}, {}, "num_probes must be >= 2"),
    "scheme": (ArgumentError, {"scheme": "h2"}, {}, "scheme must be one of"),
    "seed": (ArgumentError, {"random_state": -1}, {}, "random_state must be >= 0"),
    "a list": (DtypeError, {"compress_options": ["max_rank"]}, {}, "compress_options must be a"),
    "comm twice": (ArgumentError, {"compress_options": {"comm": 1}}, {}, "got 'comm'"),
    "nu": (ArgumentError, {"kernel_options": {"nu": 1.5}}, {}, "kernel_options may have alpha"),
    "alpha": (ArgumentError, {"kernel_options": {"alpha": 1.5}}, {}, "alpha belongs to kernel"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "data", "words"), BAD.values(), ids=BAD)
def test_refused(kind: type[Exception], options: dict[str, Any], data: dict[str, Any], words: str):
    refused(kind, lambda: fixed(**options).fit(**{"X": X, "y": Y, **data}), words)


def test_bad_questions():
    process = gh.GaussianProcess(**AT, **TIGHT, max_iter=1)
    refused(ArgumentError, process.log_marginal_likelihood, "call fit before")
    process.fit(X, Y)
    refused(ShapeError, lambda: process.predict(np.ones((3, 5))), "X has 5 features")
    both = {"return_std": True, "return_cov": True}
    refused(ArgumentError, lambda: process.predict(NEW, **both), "At most one of")
    refused(ArgumentError, lambda: process.sample_y(NEW, 0), "n_samples must be >= 1")
    refused(DtypeError, lambda: process.sample_y(NEW, random_state="a"), "random_state")
    refused(ShapeError, lambda: process.log_marginal_likelihood([1.0]), "theta must be finite")
    nan = np.full(4, np.nan)
    refused(ShapeError, lambda: process.log_marginal_likelihood(nan), "variance, lengthscale,")
    sparse = pytest.importorskip("scipy.sparse")
    refused(DtypeError, lambda: process.fit(sparse.csr_array(X), Y), "sparse matrix")


def test_scikit_learn_is_not_needed():
    code = """
import sys, warnings
sys.modules["sklearn"] = None
import numpy as np
import gpu_hodlr as gh
x = np.linspace(0, 1, 40)[:, None]
process = gh.GaussianProcess(noise=1e-3).fit(x, x[:, 0])
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    process.fit(x, x)
print(found[0].category.__name__, process.score(x, x) > 0.99, process.predict(x[:1]).shape)
"""
    assert python(code) == ["UserWarning True (1,)"]
