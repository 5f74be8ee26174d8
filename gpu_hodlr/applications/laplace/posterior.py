"""The Laplace approximation of a network's posterior."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gpu_hodlr.applications.laplace.curvature import Curvature
from gpu_hodlr.applications.laplace.evidence import evidence, slopes
from gpu_hodlr.applications.laplace.likelihood import Likelihood
from gpu_hodlr.applications.laplace.maximum import check_bounds, maximized
from gpu_hodlr.applications.laplace.prediction import LaplacePrediction, check_link, predicted
from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.applications.laplace.saved import about, check_network, read_likelihood, read_prior
from gpu_hodlr.applications.linearized import Linearized
from gpu_hodlr.arrays import tensor_of
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.compression.load import load_with
from gpu_hodlr.devices import HostArray, to_host
from gpu_hodlr.distributed import communicator
from gpu_hodlr.errors import ArgumentError, FileFormatError, closeness_unsaid
from gpu_hodlr.files.archive import damage_named
from gpu_hodlr.files.writing import AnyPath
from gpu_hodlr.networks import GGNOperator
from gpu_hodlr.networks.curvature import Reading, kind_of
from gpu_hodlr.networks.data import Tree, inputs_and_targets
from gpu_hodlr.networks.model import Model, Network, Output, Params, choose

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDevice, AnyDtype

_GIVEN = "damping", "comm"  # options of compress that are said otherwise


class Laplace:
    """The Laplace approximation N(theta, (G + P)^-1) of a network's posterior, at its weights.

    G is the Gauss-Newton matrix of the loss summed over the data (its own mean or not), compressed;
    P the precision of the prior N(0, P^-1). exp(-loss) is the likelihood: "mse" is that of a
    variance of 1/2, `functools.partial(torch.nn.functional.gaussian_nll_loss, var=...)` of any.
    The log marginal likelihood is log p(data | theta) - theta^T P theta / 2 + log det(P) / 2 -
    log det(G + P) / 2; MacKay, Neural Computation 4 (1992); Daxberger et al., NeurIPS 2021.

    G is compressed for the prior: its spectral error is a tenth of the smallest precision, as
    `compress(damping=)` has it, and it is compressed again, more closely, where a smaller one
    comes. Where that cannot be, an `AccuracyWarning` says so. All else is exact of the compressed
    matrix with the forms "hss", "hodlr" and "lowrank"; with "kfe" log-determinant and traces are
    estimates.

    Collective: all ranks make it and call its methods, with the same arguments.

    Args:
        model: see `GGNOperator`; trained, with dropout and batch normalization in evaluation mode.
        loss: see `GGNOperator`.
        data: (inputs, targets), or an iterable of such pairs, such as a DataLoader.
        prior_precision: a number > 0; a dict of one for every layer or parameter by name; or
            an array (N,) of one for every parameter.
        scheme: of `compress`; "auto" is "hss" up to N = 5,000; beyond that "lowrank" where samples
            times outputs are at most 10,000 and well below N, else what it is there.
        params, output, dtype, entries: see `GGNOperator`; the posterior is of `params`, such as
            those of the last layer, and all others are constants.
        seed: of every random choice.
        comm: an mpi4py communicator, see `compress`.
        **options: of `compress`: max_rank (N / 2 by default, but 256 to 2,500), rtol, device, ...;
            low rank of so few rows leaves out next to nothing where none of them is given, other
            keeps the diagonal of the rest (`tail="diagonal"`) where that is known.

    Attributes:
        matrix: G compressed.
        num_data: samples.
        log_likelihood: log p(data | theta); of a loss of one's own, or with weights, up to a
            constant of the data.
        mean: theta, (N,) float64, a host array.

    Raises:
        ArgumentError, DtypeError, ShapeError, UnsupportedLayerError: see `GGNOperator`; a prior
            that is not positive or leaves parameters out.

    Warns:
        AccuracyWarning, RankCapWarning: the compression is not as close as the prior needs.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
        >>> model = torch.nn.Linear(1, 1).double()
        >>> _ = torch.nn.init.constant_(model.weight, 2.0), torch.nn.init.zeros_(model.bias)
        >>> posterior = gh.Laplace(model, "mse", (x, 2 * x), prior_precision=0.1)
        >>> round(posterior.log_marginal_likelihood(), 3)  # 40 observations of variance 1/2
        -29.257
        >>> posterior.predict(torch.zeros(1, 1)).variance.round(decimals=5)  # 1 / (80 + 0.1)
        tensor([[0.0125]], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        data: Tree,
        prior_precision: Any = 1.0,
        scheme: str = "auto",
        *,
        params: Params = None,
        output: Output = None,
        dtype: AnyDtype | None = None,
        entries: str = "auto",
        seed: int = 0,
        comm: Any = None,
        **options: Any,
    ) -> None:
        for name in _GIVEN:
            if name in options:
                raise ArgumentError(f"{name} must not be given: the prior's precision is it")
        self._model, self._loss, self._data = model, loss, data
        self._reading: dict[str, Any] = {
            "params": params, "output": output, "dtype": dtype, "entries": entries, "seed": seed,
        }  # fmt: skip
        self._comm, self._options = comm, {"scheme": scheme, "seed": seed, **options}
        self._given = prior_precision
        self.fit()

    def fit(self) -> Self:
        """Make the posterior again, of the weights that the model has now; the prior stays.

        Collective: all ranks call.

        Raises:
            ArgumentError: it was loaded, and has no data.

        Example:
            >>> import torch
            >>> x, model = torch.ones(4, 1), torch.nn.Linear(1, 1)
            >>> posterior = gh.Laplace(model, "mse", (x, x))
            >>> _ = torch.nn.init.constant_(model.weight, 3.0)
            >>> float(posterior.fit().mean[0])
            3.0
        """
        if self._model is None:
            raise ArgumentError("a loaded posterior has no data to be made of again")
        inputs, targets = inputs_and_targets(self._data)
        ranks = communicator(self._comm, "cpu")  # what is agreed here is on the host
        with ranks.agreed():
            reading = Reading(
                self._model, self._loss, inputs, targets, reduction="sum", num_data=None,
                **self._reading,
            )  # fmt: skip
            linear = Linearized(reading.network, reading.seed)
            prior = Prior.read(self._given, linear.sizes)
            ranks.same(prior_precision=prior.rows(), network=linear.fingerprint())
            op = GGNOperator._of(reading)
            likelihood = Likelihood.of(linear, reading.data, reading.loss)
        curvature = Curvature(op, None, {**self._options, "comm": self._comm})
        self._set(linear, likelihood, prior, curvature)
        self._prepared(frames=3)
        return self

    def _set(
        self, linear: Linearized, likelihood: Likelihood, prior: Prior, curvature: Curvature
    ) -> None:
        self._linear, self._likelihood, self._curvature = linear, likelihood, curvature
        self.mean = linear.theta
        self._set_prior(prior)

    def _set_prior(self, prior: Prior) -> None:
        self._prior, self._given = prior, prior.given  # own arrays, whatever the user's become
        self._factorized: tuple[StructuredMatrix, Any] | None = None

    def _prepared(self, frames: int) -> Any:
        """The factor at the prior, made where `matrix` is new; frames: up to the user's call."""
        if self._factorized is None or self._factorized[0] is not self.matrix:
            factor = self._curvature.factor(self._prior)
            self._factorized = self.matrix, factor
            self._curvature.warn(self._prior, frames + 1)
        return self._factorized[1]

    @property
    def matrix(self) -> StructuredMatrix:
        """G compressed."""
        return self._curvature.matrix

    @property
    def factor(self) -> Any:
        """Of G + P."""
        return self._prepared(frames=2)

    @property
    def num_data(self) -> int:
        """Samples."""
        return self._likelihood.num_data

    @property
    def log_likelihood(self) -> float:
        """Log p(data | theta)."""
        return self._likelihood.value

    @property
    def prior_precision(self) -> Any:
        """As it was given: a number, a dict, or an array (N,). It can be set."""
        return self._prior.given

    @prior_precision.setter
    def prior_precision(self, given: Any) -> None:
        """Another prior: the factor is made again at the next use."""
        self._set_prior(self._read_prior(given))

    def __repr__(self) -> str:
        said = self._prior.given
        prior = f"{said:.4g}" if isinstance(said, float) else "of every layer or parameter"
        return f"Laplace(prior_precision {prior}, {self.num_data} samples, {self.matrix!r})"

    @property
    def num_effective(self) -> float:
        """Parameters that the data decide about, tr(G (G + P)^-1) = N - sum_i P_i (G + P)^-1_ii.

        Collective: all ranks ask.
        """
        return float(slopes(self.mean, self._prior, self._prepared(frames=2))[1].sum())

    def log_marginal_likelihood(
        self, prior_precision: Any = None, *, gradient: bool = False
    ) -> Any:
        """The log marginal likelihood, at the posterior's prior or another one.

        Collective: all ranks call.

        Args:
            prior_precision: None, or as the class takes it.
            gradient: whether its derivatives are wanted too.

        Returns:
            The value; with `gradient` a pair of it and its derivatives in log p, a number, or a
            dict where the prior is one; of an array in the logarithm of a common factor:
            (n_g - p_g |theta_g|^2 - p_g tr_g (G + P)^-1) / 2 of the n_g parameters of a group g.

        Example:
            >>> import torch
            >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
            >>> posterior = gh.Laplace(torch.nn.Linear(1, 1).double(), "mse", (x, x))
            >>> at = posterior.log_marginal_likelihood
            >>> slope = (at(2.0 * 1.001) - at(2.0 / 1.001)) / (2 * np.log(1.001))
            >>> bool(np.isclose(at(2.0, gradient=True)[1], slope, rtol=1e-3))
            True
        """
        if prior_precision is None:
            prior, factor = self._prior, self._prepared(frames=2)
        else:
            prior = self._read_prior(prior_precision)
            factor = self._curvature.factor(prior)
            self._curvature.warn(prior, frames=2)
        value = evidence(self.log_likelihood, self.mean, prior, factor)
        if not gradient:
            return value
        found = slopes(self.mean, prior, factor)[0].tolist()
        return value, dict(zip(prior.names, found, strict=True)) if prior.names else found[0]

    def evidence_error(self, num_probes: int = 16, seed: int = 0) -> tuple[float, float]:
        """By how much the log marginal likelihood is too large, and the standard error of that.

        What the compression leaves out, E = G - K, changes it by -tr((K + P)^-1 E) / 2 to first
        order: estimated with random signs and products with G.

        Collective: all ranks call.

        Args:
            num_probes: vectors, at least 2; with N of them the trace is exact.
            seed: of these.

        Raises:
            ArgumentError: a loaded posterior has no data; bad arguments.

        Example:
            >>> import torch
            >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
            >>> posterior = gh.Laplace(torch.nn.Linear(1, 1).double(), "mse", (x, x))
            >>> abs(posterior.evidence_error()[0]) < 1e-9
            True
        """
        comm = self.matrix.owners.comm
        with comm.agreed():
            check_count(num_probes, "num_probes", least=2)
            check_count(seed, "seed", least=0)
            comm.same(num_probes=num_probes, seed=seed)
        return self._curvature.missed(self._prepared(frames=2), num_probes, seed)

    def optimize_prior_precision(
        self,
        structure: str | None = None,
        *,
        bounds: tuple[float, float] = (1e-6, 1e9),
        rtol: float = 1e-3,
        maxiter: int = 50,
    ) -> Any:
        """Set the prior that maximizes the log marginal likelihood, by its gradient.

        By L-BFGS in log p. G is compressed again wherever a precision becomes smaller than what it
        was compressed for. At a maximum p_g |theta_g|^2 is the number of effective parameters of
        the group (MacKay), and rtol is how far from each other the two may be.

        Collective: all ranks call.

        Args:
            structure: "scalar" for one precision; "layer" for one of every layer; None for what
                the prior is: of a dict its groups, of an array a common factor.
            bounds: of every precision.
            rtol: see above.
            maxiter: steps, at most.

        Returns:
            The new `prior_precision`.

        Raises:
            ArgumentError, DtypeError: an argument that cannot be used.

        Warns:
            AccuracyWarning: it ended at a bound, without having converged, or where the matrix is
                not close enough; what is tried on the way is not warned of.

        Example:
            >>> import torch
            >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
            >>> model = torch.nn.Linear(1, 1).double()
            >>> _ = torch.nn.init.constant_(model.weight, 2), torch.nn.init.constant_(model.bias, 1)
            >>> posterior = gh.Laplace(model, "mse", (x, 2 * x + 1))
            >>> round(posterior.optimize_prior_precision(), 2)  # about 2 / |theta|^2
            0.4
        """
        comm = self.matrix.owners.comm
        with comm.agreed():
            check_bounds(bounds)
            check_number(rtol, "rtol", positive=True)
            check_count(maxiter, "maxiter")
            prior = self._prior.structured(structure, self._linear.sizes)
            comm.same(structure=structure, bounds=str(bounds), rtol=rtol, maxiter=maxiter)

        def evaluate(prior: Prior) -> tuple[float, HostArray, HostArray]:
            with closeness_unsaid():  # what is tried on the way need not be close
                factor = self._curvature.factor(prior)
            value = evidence(self.log_likelihood, self.mean, prior, factor)
            return value, *slopes(self.mean, prior, factor)

        self._set_prior(maximized(evaluate, prior, bounds, rtol, maxiter, comm.rank == 0))
        self._prepared(frames=2)
        return self._prior.given

    def _read_prior(self, given: Any) -> Prior:
        with self.matrix.owners.comm.agreed():
            prior = Prior.read(given, self._linear.sizes)
            self.matrix.owners.comm.same(prior_precision=prior.rows())
        return prior

    def sample(self, num: int, seed: int = 0) -> torch.Tensor:
        """Parameters drawn from the posterior, (num, N), in the order of `parameters_to_vector`.

        Collective: all ranks call.

        Raises:
            DtypeError, ArgumentError: num is not an integer >= 1, seed not one >= 0.

        Example:
            >>> import torch
            >>> x = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
            >>> posterior = gh.Laplace(torch.nn.Linear(1, 1).double(), "mse", (x, x), 1.0)
            >>> draws = posterior.sample(2000)
            >>> bool(np.isclose(draws[:, 1].var(), 1 / (2 * 40 + 1), rtol=0.1))
            True
        """
        noise = to_host(self._prepared(frames=2).sample(num, seed, inverse=True))
        theta = self._linear.network.theta[0]
        return tensor_of(np.ascontiguousarray((self.mean[:, None] + noise).T)).to(theta)

    def predict(
        self,
        inputs: Tree,
        *,
        link: str | None = "auto",
        covariance: bool = False,
        num_samples: int = 1000,
        seed: int = 0,
    ) -> LaplacePrediction:
        """Mean, variance and class probabilities at inputs, of the network linearized at theta.

        The outputs f are normal, with the network's own as their mean and the covariance
        J (G + P)^-1 J^T. Of cross entropies the probabilities are sigmoid or softmax of
        f / sqrt(1 + pi / 8 var f) ("probit"; MacKay 1992), or a mean over draws of f ("mc").

        Collective: all ranks call.

        Args:
            inputs: as the model takes them; see `GGNOperator`.
            link: "probit", "mc", "auto" (probit where the loss is a cross entropy) or None.
            covariance: whether the covariance of the outputs of each sample is wanted.
            num_samples: draws of "mc".
            seed: of these.

        Raises:
            ArgumentError, ShapeError, DtypeError, DeviceError: inputs or options do not fit; link
                is given for a loss that has no classes.

        Example:
            >>> import torch
            >>> x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]], dtype=torch.float64)
            >>> model = torch.nn.Linear(1, 2).double()
            >>> posterior = gh.Laplace(model, "cross_entropy", (x, (x[:, 0] > 0).long()))
            >>> found = posterior.predict(x)
            >>> found.variance.shape, bool(np.allclose(found.probabilities.sum(1), 1.0))
            (torch.Size([4, 2]), True)
        """
        comm, likelihood = self.matrix.owners.comm, self._likelihood
        with comm.agreed():
            link = check_link(link, likelihood.kind)
            check_count(num_samples, "num_samples")
            check_count(seed, "seed", least=0)
            comm.same(link=link, covariance=bool(covariance), num_samples=num_samples, seed=seed)
            batch = self._linear.batch(inputs)
        F = self._prepared(frames=2)
        return predicted(self._linear, F, batch, likelihood, link, covariance, num_samples, seed)

    def save(self, path: AnyPath) -> None:
        """Write the posterior to one file, without the data and the network's weights.

        Collective: all ranks call.

        It is the file of `matrix`, which `gh.load` reads of it, with the prior beside.

        Raises:
            OSError, ArgumentError: see `CompressedMatrix.save`.

        Example:
            >>> import torch
            >>> x, model = torch.ones(4, 1), torch.nn.Linear(1, 1)
            >>> posterior = gh.Laplace(model, "mse", (x, x), prior_precision=2.0)
            >>> posterior.save("posterior.npz")
            >>> gh.Laplace.load("posterior.npz", model).prior_precision
            2.0
        """
        self._prepared(frames=2)
        said = about(self._linear, self._likelihood, self._prior, self._options["seed"])
        self.matrix._save(path, {"laplace": said})

    @classmethod
    def load(
        cls,
        path: AnyPath,
        model: Model,
        *,
        params: Params = None,
        output: Output = None,
        dtype: AnyDtype | None = None,
        device: AnyDevice = "cpu",
        comm: Any = None,
    ) -> Laplace:
        """Read a posterior that `save` wrote, for the network that it is of.

        It does all but `fit`. Without the data it is not compressed again for a smaller prior:
        an `AccuracyWarning` says so.

        Collective: all ranks call.

        Args:
            path: of the file.
            model: the network, with the weights that it had.
            params: as it was, like the next two.
            output: see `GGNOperator`.
            dtype: see `GGNOperator`.
            device: where the matrix is to be, see `gh.load`.
            comm: see `gh.load`.

        Raises:
            FileNotFoundError, FileFormatError: see `gh.load`; a file without a posterior.
            ArgumentError: the network has other weights, or other parameters are chosen.

        Example:
            >>> import torch
            >>> x, model = torch.ones(4, 1), torch.nn.Linear(1, 1)
            >>> gh.Laplace(model, "mse", (x, x)).save("posterior.npz")
            >>> round(gh.Laplace.load("posterior.npz", model).num_effective, 3)  # 16 / (16 + 1)
            0.941
        """
        matrix, more = load_with(path, device, comm)
        said = more.get("laplace")
        if said is None or not isinstance(matrix, StructuredMatrix):
            raise FileFormatError(f"{path!r} has a matrix or factor, no posterior of gh.Laplace")
        with matrix.owners.comm.agreed():
            chosen = choose(model, params)
            network = Network.of(chosen, output, kind_of(chosen, dtype))
            with damage_named(path):
                linear = Linearized(network, int(said["seed"]))
                prior, likelihood = read_prior(said, linear), read_likelihood(said)
            check_network(said, linear)
        self = cls.__new__(cls)
        self._model, self._options = None, {"seed": said["seed"]}
        self._set(linear, likelihood, prior, Curvature(None, matrix, {}))
        return self
