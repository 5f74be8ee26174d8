"""What tangents (units, columns, n) of a Linear layer are multiplied by."""

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.networks.layers import Layer

# Columns from which on a GEMM a unit, which reads vectors as they lie, is faster than one for all
# units. It packs the layer's inputs again for every unit, 1 / columns of its operations; one for
# all wants vectors copied, 1 / n. Measured, of 196 inputs: as fast at 16 columns of 64 samples, 32
# of 128, 64 of 256.
BY_UNIT, _SAMPLES = 16, 4


def by_unit(columns: int, n: int) -> bool:
    """Whether a GEMM a unit is the faster way, for columns of n samples."""
    return columns >= max(BY_UNIT, n // _SAMPLES)


def unit_rows(weight: Array, bias: Array) -> Array:
    """Rows (w k, f), a unit's and column's parameters, of weights (w, d_in, k), biases (w, k)."""
    width, inputs, columns = weight.shape
    rows = namespace(weight).empty((width, columns, inputs + (len(bias) > 0)), weight.dtype)
    rows[:, :, :inputs] = weight.swapaxes(1, 2)
    if len(bias):
        rows[:, :, inputs] = bias
    return rows.reshape(width * columns, -1)


def put_unit_rows(rows: Array, weight: Array, bias: Array) -> None:
    """Write such rows to weights and biases."""
    width, inputs, columns = weight.shape
    rows = rows.reshape(width, columns, -1)
    weight[:] = rows[:, :, :inputs].swapaxes(1, 2)
    if len(bias):
        bias[:] = rows[:, :, inputs]


def push_forward(layer: Layer, v: Array, out: Array) -> None:
    """Write a unit's V^T X + b, (w, k, n), for the layer's rows v, (w f, k), of vectors."""
    xp, (width, columns, n) = namespace(v), out.shape
    weight, bias = _parts(layer, v)
    inputs = layer.inputs
    if layer.trained and not by_unit(columns, n):
        rows = unit_rows(weight, bias)
        xp.matmul(rows, layer.features, out=out.reshape(width * columns, n))
        return
    if inputs:
        xp.matmul(weight.swapaxes(1, 2), layer.features[:inputs], out=out)
    else:
        out[:] = 0
    if layer.bias:
        out += bias[:, :, None]


def pull_back(layer: Layer, e: Array, out: Array) -> None:
    """Write a unit's X E^T and the sums of E over samples, (w f, k), for E (w, k, n)."""
    width, columns, n = e.shape
    weight, bias = _parts(layer, out)
    flat, inputs = e.reshape(width * columns, n), layer.inputs
    if layer.trained and not by_unit(columns, n):
        put_unit_rows(flat @ layer.features.T, weight, bias)
        return
    if inputs:
        namespace(e).matmul(layer.features[:inputs], e.swapaxes(1, 2), out=weight)
    if layer.bias:
        bias[:] = (flat @ layer.features[inputs]).reshape(width, columns)


def _parts(layer: Layer, v: Array) -> tuple[Array, Array]:
    """Weights (w, d_in, k) and biases (w, k), or none of these, in the layer's rows; views."""
    split = layer.width * layer.inputs
    return v[:split].reshape(layer.width, layer.inputs, v.shape[1]), v[split:]
