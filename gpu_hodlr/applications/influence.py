"""What a training sample does to the loss of a test sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from gpu_hodlr import batched
from gpu_hodlr.arrays import tensor_of
from gpu_hodlr.checks import check_number
from gpu_hodlr.compression import compress
from gpu_hodlr.devices import (
    Array,
    check_memory,
    device_kind,
    is_torch,
    memory_errors,
    move,
    namespace,
)
from gpu_hodlr.distributed import communicator
from gpu_hodlr.errors import DtypeError, ShapeError
from gpu_hodlr.factor import Solver
from gpu_hodlr.networks import GGNOperator, SampleGradients
from gpu_hodlr.networks.data import inputs_and_targets

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyArray, AnyDevice, AnyDtype
    from gpu_hodlr.networks.data import Tree
    from gpu_hodlr.networks.model import Model, Output, Params


def influence(F: Solver, train_gradients: Any, test_gradients: AnyArray) -> Any:
    """Influence scores -g_test^T (K + damping I)^-1 g_train, for every pair of samples.

    The derivative of a test sample's loss in the weight that a training sample is given more of
    (Koh and Liang, Understanding black-box predictions via influence functions, ICML 2017,
    equation 2): below zero it helps, above it harms. Where the training loss is a mean over n
    samples, leaving one out changes the test loss by about -score / n; where it is a sum, by
    -score.

    Collective: all ranks call.

    Args:
        F: the factor of K + damping I, from `K.factorize`; K the Gauss-Newton matrix, or the
            Hessian, of the training loss.
        train_gradients: (N, n) gradients of the training samples' losses in the parameters, a
            column each; or a list, tuple or iterator of such batches, (N, n_1), (N, n_2), ..., of
            which one is used at a time.
        test_gradients: (N, m) of the test samples, or (N,) of one: as many solves.

    Returns:
        (m, n) scores, of the library of test_gradients, in the dtype of F.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: F is no factor; gradients are not
            (N, n), floating, finite, on its device; no batch.

    Example:
        >>> F = gh.compress(np.diag([1.0, 3.0])).factorize(damping=1.0)
        >>> gh.influence(F, np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([2.0, 2.0])).round(6)
        array([[-1., -1.]])
    """
    if not isinstance(F, Solver):
        raise DtypeError(f"F must be a factor, of K.factorize, got {type(F).__name__}")
    solved = F.solve(_columns(F, test_gradients, "test_gradients"))
    several = isinstance(train_gradients, list | tuple | Iterator)
    batches: Iterable[Any] = train_gradients if several else [train_gradients]
    scores = []
    for index, batch in enumerate(batches):
        name = f"train_gradients[{index}]" if several else "train_gradients"
        columns = _columns(F, batch, name)
        with batched.one_blas_thread():
            scores.append(-F.owners.sum(solved.T @ columns))
    if not scores:
        raise ShapeError("train_gradients must have a batch, got none")
    found = namespace(solved).concatenate(scores, axis=1)
    return tensor_of(found) if is_torch(test_gradients) else found


def influence_of(
    model: Model,
    loss: object,
    train: Tree,
    test: Tree,
    damping: float,
    *,
    params: Params = None,
    output: Output = None,
    reduction: str | None = None,
    dtype: AnyDtype | None = None,
    device: AnyDevice | None = None,
    scheme: str = "auto",
    seed: int = 0,
    comm: Any = None,
    **options: Any,
) -> torch.Tensor:
    """Influence scores of a network's training samples on its test samples; see `influence`.

    The Gauss-Newton matrix of the training loss is compressed to what the damping needs
    (`compress(op, damping=damping)`) and factorized; gradients of every sample's loss come from
    torch, batch by batch. A sample's loss is what the training loss is the mean, or the sum, of:
    also a test sample's, whose scores do not depend on which others are tested.

    Collective: all ranks call, with the same model and data; each computes all gradients.

    Args:
        model: see `GGNOperator`, as loss, params, output, reduction and dtype.
        loss: convex in the outputs.
        train: (inputs, targets), a tuple of two; or an iterable of such pairs, a list or a
            DataLoader, that gives the samples in the same order at every pass.
        test: likewise. Its gradients, (N, m), are held in memory.
        damping: > 0, as of an objective with damping / 2 norm(theta)^2.
        params: which parameters.
        output: where the predictions are in what the model returns.
        reduction: "mean", "sum" or "none"; the loss's by default.
        dtype: float32 or float64.
        device: of the matrix and its factor, the model's by default.
        scheme: see `compress`.
        seed: of every random choice.
        comm: an mpi4py communicator.
        **options: of `compress`: max_rank, leaf_size, ...

    Returns:
        (m, n) scores; torch's, on the device of the factor.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError, UnsupportedLayerError: see `GGNOperator`
            and `compress`; a damping that is not > 0, samples in no fixed order.
        MemoryEstimateError: the gradients of the test samples, or the matrix, do not fit.
        NotPositiveDefiniteError: see `K.factorize`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1).double()
        >>> _ = model.weight.data.fill_(2.0), model.bias.data.fill_(0.0)
        >>> x, y = torch.tensor([[[1.0], [-1.0]], [[1.0], [-4.0]]], dtype=torch.float64)
        >>> new = (0 * x[:1], -y[:1])
        >>> # K = 2 I; gradients 2 (f(x) - y) (x, 1): (2, 2) and (-4, 4), of the test sample (0, 2)
        >>> gh.influence_of(model, "mse", (x, y), new, damping=2.0).round(decimals=6)
        tensor([[-1., -2.]], dtype=torch.float64)
    """
    said: dict[str, Any] = {
        "params": params, "output": output, "reduction": reduction, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    ranks = communicator(comm, "cpu" if device is None else device_kind(device))
    with ranks.agreed():
        damping = check_number(damping, "damping", positive=True)
        given = SampleGradients(model, loss, *inputs_and_targets(train), **said, name="train")
        new = SampleGradients(
            model, loss, *inputs_and_targets(test), **said, name="test", like=given
        )
        op = GGNOperator(model, loss, *inputs_and_targets(train), **said)
        what = f"gradients of {new.num_samples} test samples"
        needed = 3 * op.shape[0] * new.num_samples * op.dtype.itemsize
        check_memory(needed, what, "the number of test samples", op.device)
    K = compress(op, scheme, damping=damping, device=device, seed=seed, comm=comm, **options)
    F = K.factorize(damping)
    with memory_errors(what, "the number of test samples", F.device):
        columns: list[Array] = [move(part, F.device) for part in new]
        whole = namespace(columns[0]).concatenate(columns, axis=1)
        scores = influence(F, (move(part, F.device) for part in given), whole)
    return tensor_of(scores)


def _columns(F: Solver, x: Any, name: str) -> Array:
    """This rank's rows of gradients, a column each.

    Raises:
        DtypeError, ShapeError, DeviceError, ArgumentError: see `arrays.as_columns`.
    """
    n = F.shape[0]
    columns, _ = F.owners.right_hand_side(x, n, F.dtype, F.device, name)
    return columns
