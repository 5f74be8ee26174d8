"""Matrices of other packages as operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.devices import (
    AnyArray,
    Array,
    HostIndex,
    device_kind,
    device_of,
    is_array,
    is_torch,
    library_of,
    namespace,
)
from gpu_hodlr.errors import DtypeError, ShapeError
from gpu_hodlr.operators.dense import DenseOperator
from gpu_hodlr.operators.function import FunctionOperator
from gpu_hodlr.operators.operator import Operator


def as_operator(x: object, *, definite: bool = True) -> Operator:
    """An operator of what another package calls a matrix; the repr says what it can give.

    =======================================  ============================
    x                                        what there is
    =======================================  ============================
    Operator                                 it is returned
    dense array (NumPy, CuPy, torch)         products, entries, diagonal
    sparse matrix or array (SciPy, CuPy)     products, entries, diagonal
    `linear_operator` (gpytorch)             products, entries, diagonal
    SciPy's LinearOperator, curvlinops       products
    others with `matmat`, `@` or `matvec`    products
    =======================================  ============================

    Args:
        x: the matrix, symmetric.
        definite: whether it is positive semi-definite, see `Operator`. An Operator's own counts.

    Raises:
        DtypeError: x is none of these, or neither float32 nor float64.
        ShapeError: not square, or N < 2.

    Example:
        >>> from scipy.sparse import diags_array
        >>> gh.as_operator(diags_array(np.arange(1.0, 6.0))).diagonal()
        array([1., 2., 3., 4., 5.])
        >>> from scipy.sparse.linalg import aslinearoperator
        >>> gh.as_operator(aslinearoperator(np.eye(3)), definite=True)
        FunctionOperator(3 x 3, float64, cpu, products, positive semi-definite by declaration)
    """
    if isinstance(x, Operator):
        return x
    if is_array(x):
        return DenseOperator(x, definite=definite)
    known = library_of(x)
    if known == "linear_operator":
        return _of_torch(x, definite, entries=True)
    if known == "curvlinops":
        return _of_torch(x, definite, entries=False)
    if hasattr(x, "tocsr") and hasattr(x, "diagonal"):
        return _of_sparse(x, definite)
    multiply = _product_of(x)
    if multiply is None or not hasattr(x, "shape"):
        raise DtypeError(
            f"op must be an Operator, an array, or have shape and matmat, matvec or @, got "
            f"{type(x).__module__}.{type(x).__qualname__}"
        )
    return FunctionOperator(
        _order(x.shape), matmat=multiply, dtype=_dtype(x), device=_device(x), definite=definite
    )


def device_of_matrix(x: object) -> str:
    """Where a matrix is that `as_operator` takes, before ranks are known to tell of a failure.

    Where it cannot be said, "cpu": `as_operator` asks again.
    """
    if is_array(x):
        return device_of(x)
    try:
        return _device(x)
    except Exception:
        return "cpu"


def _device(x: object) -> str:
    """Of what is no array."""
    known = library_of(x) in ("cupy", "cupyx")
    return "cuda" if known else device_kind(getattr(x, "device", "cpu"))


def _order(shape: tuple[int, ...]) -> int:
    n, m = shape
    if n != m:
        raise ShapeError(f"op must be square, got shape {tuple(shape)}")
    return int(n)


def _dtype(x: object) -> np.dtype[Any]:
    """X's own; float64 of one that does not say, or of integers.

    Raises:
        DtypeError: complex, or floating of another width.
    """
    dtype = np.dtype(str(getattr(x, "dtype", None) or "float64").removeprefix("torch."))
    return check_dtype(dtype, "op.dtype") if dtype.kind in "fc" else np.dtype(np.float64)


def _product_of(x: object) -> Callable[[Array], Any] | None:
    if hasattr(x, "matmat"):
        return x.matmat
    if hasattr(x, "__matmul__"):
        return lambda v: x @ v
    if hasattr(x, "matvec"):
        return lambda v: namespace(v).stack([x.matvec(column) for column in v.T], axis=1)
    return None


def _of_sparse(x: Any, definite: bool) -> Operator:
    rows = x.tocsr()
    dtype = _dtype(rows)
    if rows.dtype != dtype:
        rows = rows.astype(dtype)
    op = FunctionOperator(
        _order(rows.shape),
        matmat=lambda v: rows @ v,
        entries=lambda i, j: rows[i][:, j].toarray(),
        diagonal=rows.diagonal,
        dtype=dtype, device=_device(x), definite=definite, product_cost=2.0 * rows.nnz,
    )  # fmt: skip
    return op


def _of_torch(x: Any, definite: bool, *, entries: bool) -> Operator:
    """Of a package whose matrices multiply torch tensors."""
    torch = sys.modules["torch"]  # x is made of its tensors

    def tensor(v: Array) -> AnyArray:
        return torch.as_tensor(v, device=x.device)

    def product(v: Array) -> AnyArray:
        with torch.no_grad():
            return _plain(x @ tensor(v))

    def block(rows: HostIndex, cols: HostIndex) -> AnyArray:
        with torch.no_grad():
            found = x[..., torch.from_numpy(rows), :][..., torch.from_numpy(cols)]
            return _plain(found.to_dense())

    def diagonal() -> AnyArray:
        with torch.no_grad():
            return _plain(x.diagonal())

    return FunctionOperator(
        _order(x.shape),
        matmat=product,
        entries=block if entries else None,
        diagonal=diagonal if entries else None,
        dtype=_dtype(x), device=_device(x), definite=definite,
    )  # fmt: skip


def _plain(x: AnyArray) -> AnyArray:
    return x.detach() if is_torch(x) else x
