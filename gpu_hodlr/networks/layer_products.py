"""What tangents (units, columns, n) of a Linear layer are multiplied by."""

from gpu_hodlr.devices import Array, namespace

# Columns from which on a GEMM a unit, which reads vectors as they lie, is faster than one for all
# units, which needs them transposed; measured, of 785 inputs at 256 samples.
BY_UNIT = 16


def transposed_times(weight: Array, x: Array, out: Array) -> None:
    """Write a unit's V^T X, (w, k, n), of stacks V (w, f, k) and one X (f, n)."""
    width, inputs, columns = weight.shape
    turned, xp = weight.swapaxes(1, 2), namespace(x)
    if columns >= BY_UNIT:
        xp.matmul(turned, x, out=out)
    else:
        xp.matmul(turned.reshape(-1, inputs), x, out=out.reshape(width * columns, -1))


def times_transposed(x: Array, e: Array, out: Array) -> None:
    """Write a unit's X E^T, (w, f, k), of one X (f, n) and stacks E (w, k, n)."""
    width, columns, n = e.shape
    if columns >= BY_UNIT:
        namespace(x).matmul(x, e.swapaxes(1, 2), out=out)
    else:
        out[:] = (e.reshape(-1, n) @ x.T).reshape(width, columns, -1).swapaxes(1, 2)
