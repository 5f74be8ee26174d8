"""What a Gaussian process says of new points: mean, variance, covariance and samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.applications.gaussian_process.evidence import Evidence
from gpu_hodlr.applications.gaussian_process.hyperparameters import Hyperparameters
from gpu_hodlr.applications.likelihood import usual_options
from gpu_hodlr.compression import compress
from gpu_hodlr.devices import Array, check_memory, device_of, namespace
from gpu_hodlr.distributed import Communicator, shares
from gpu_hodlr.errors import AccuracyWarning
from gpu_hodlr.operators import KernelOperator

_ROWS = 2048  # new points whose means are taken together
_CHUNK, _LEAST_CHUNK = 512, 16  # new points that are solved for together
_CHUNK_BYTES = 1 << 26
_COPIES = 8  # of what is solved for, meanwhile
_JITTER = 0.01  # of the noise: what is added for a factor of the prior to exist


@dataclass(frozen=True, eq=False)
class Posterior:
    """f given y = f(points) + noise, f of mean 0.

    Attributes:
        op: the kernel matrix of the points.
        weights: (K + noise)^-1 y.
        factor: of K + noise.
        ranks: that share the work.
    """

    op: KernelOperator
    weights: Array
    factor: Any
    ranks: Communicator

    def mean(self, new: Array) -> Array:
        """(M,) k(new, points) (K + noise)^-1 y."""
        return self._products(new, self.weights[:, None])[:, 0]

    def variance(self, new: Array) -> Array:
        """(M,) k(0) - |W^-1 k(points, new)|^2, K + noise = W W^T; some columns at a time.

        Warns:
            AccuracyWarning: one is negative, and 0 is given for it.
        """
        at_0, parts = self.op.diagonal()[0], []
        for part in self._chunks(len(new)):
            parts.append(at_0 - self.factor.quadratic_form(self._columns(new[part])))
        found = namespace(new).concatenate(parts)
        negative = int((found < 0).sum())
        if negative and self.ranks.rank == 0:
            warnings.warn(
                f"{negative} of {len(found)} predicted variances are negative, the least "
                f"{float(found.min()):.3g}, and 0 is given for them: the noise is too small for "
                "the accuracy of the compressed matrix",
                AccuracyWarning,
                stacklevel=3,
            )
        return namespace(found).maximum(found, 0)

    def covariance(self, new: Array, prior: Array) -> Array:
        """(M, M) K(new, new) - k(new, points) (K + noise)^-1 k(points, new).

        Args:
            new: (M, d).
            prior: K(new, new), which is overwritten.
        """
        for part in self._chunks(len(new)):
            solved = self.factor.solve(self._columns(new[part], whole=True))
            prior[:, part] -= self._products(new, solved)
        return (prior + prior.T) / 2

    def _columns(self, new: Array, *, whole: bool = False) -> Array:
        """k(points, new), (N, m) or this rank's rows of it."""
        rows = np.arange(self.op.shape[0])
        rows = rows if whole else self.factor.owners.take(rows)
        return self.op.cross(new).T.entries(rows, np.arange(len(new)))

    def _products(self, new: Array, v: Array) -> Array:
        """k(new, points) v, (M, k); the ranks share the rows, in parts that are always the same."""
        xp, starts = namespace(new), range(0, len(new), _ROWS)
        parts = [slice(start, min(start + _ROWS, len(new))) for start in starts]
        dealt = shares(len(parts), self.ranks.size)
        mine = [self.op.cross(new[part]) @ v for part in parts[dealt[self.ranks.rank]]]
        here = xp.concatenate([xp.zeros((0, v.shape[1]), v.dtype), *mine])
        counts = [sum(part.stop - part.start for part in parts[some]) for some in dealt]
        return self.ranks.allgather(here, counts)

    def _chunks(self, m: int) -> list[slice]:
        """Columns that are solved for together."""
        n = self.op.shape[0]
        size = max(_LEAST_CHUNK, min(_CHUNK, _CHUNK_BYTES // (8 * n)))
        needed = 8 * _COPIES * n * min(size, m)
        with self.ranks.agreed():  # another may have less memory
            check_memory(needed, "a prediction's variance", "the points", self.op.device)
        return [slice(start, min(start + size, m)) for start in range(0, m, size)]


def draws(
    evidence: Evidence,
    at: Hyperparameters,
    posterior: Posterior | None,
    y: Array | None,
    new: Array,
    num: int,
    seed: int,
) -> Array:
    """(M, num) samples of f at new points, of the prior or the posterior.

    The prior's are f = K (K + jitter)^-1 W z, W W^T = K + jitter of all points together: the
    jitter is smoothed away again, and with it a few times as much of the variance as it is of
    the noise. Of the posterior f is corrected by what it misses of y: f + k(new, points)
    (K + noise)^-1 (y - f(points) - noise) (Matheron's rule; Wilson et al., Efficiently sampling
    functions from Gaussian process posteriors, ICML 2020). No (M, M) matrix is formed.

    Args:
        evidence: the kernel, and how it is compressed.
        at: the hyper-parameters.
        posterior: None of the prior.
        y: (N,) the targets, where there is a posterior.
        new: (M, d).
        num: samples.
        seed: of them.
    """
    xp, n = namespace(new), 0
    jitter = _JITTER * at.least_noise
    # Two points at least make a matrix; the second one's values are dropped.
    joint = xp.concatenate([new, new[:1]])
    if posterior is not None:
        n = posterior.op.shape[0]
        joint = xp.concatenate([posterior.op.points, new])
    options = {**usual_options(len(joint)), **evidence.options}
    K = compress(evidence.operator(joint, at), damping=jitter, seed=evidence.seed, **options)
    F: Any = K.factorize(jitter)
    prior = F.sample(num, seed)
    prior -= jitter * F.solve(prior)
    if posterior is None or y is None:
        return prior[: len(new)]
    normal = batched.normal_source((seed, streams.OBSERVATIONS), device_of(new))
    noise = xp.sqrt(xp.asarray(np.broadcast_to(at.damping, n)))[:, None]
    missed = y[:, None] - prior[:n] - noise * normal((n, num), prior.dtype)
    return prior[n:] + posterior._products(new, posterior.factor.solve(missed))
