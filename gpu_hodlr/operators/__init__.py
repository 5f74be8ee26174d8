"""The matrices a user brings: dense, point kernel, or functions of their own."""

from gpu_hodlr.operators.consistency import check_consistent
from gpu_hodlr.operators.cross_kernel import CrossKernel
from gpu_hodlr.operators.dense import DenseOperator
from gpu_hodlr.operators.diagonal import Diagonal
from gpu_hodlr.operators.dual import Dual
from gpu_hodlr.operators.foreign import as_operator, device_of_matrix
from gpu_hodlr.operators.function import FunctionOperator
from gpu_hodlr.operators.kernel_derivatives import lengthscale_forms
from gpu_hodlr.operators.narrowed import NarrowedOperator
from gpu_hodlr.operators.operator import Operator, Runs
from gpu_hodlr.operators.point_kernel import KernelOperator
from gpu_hodlr.operators.product import ProductColumns, ProductRows, block_width, column_share
from gpu_hodlr.operators.reader import BlockReader
from gpu_hodlr.operators.scaled import ScaledOperator
from gpu_hodlr.operators.shared import SharedOperator
from gpu_hodlr.operators.sketch import FreshSketch, SketchColumns, SketchRows, half_even

__all__ = [
    "BlockReader",
    "CrossKernel",
    "DenseOperator",
    "Diagonal",
    "Dual",
    "FreshSketch",
    "FunctionOperator",
    "KernelOperator",
    "NarrowedOperator",
    "Operator",
    "ProductColumns",
    "ProductRows",
    "Runs",
    "ScaledOperator",
    "SharedOperator",
    "SketchColumns",
    "SketchRows",
    "as_operator",
    "block_width",
    "check_consistent",
    "column_share",
    "device_of_matrix",
    "half_even",
    "lengthscale_forms",
]
