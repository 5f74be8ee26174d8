"""`import gpu_hodlr.laplace_torch` registers `hessian_structure="gpu_hodlr"` with laplace-torch.

Example, with laplace-torch installed:

    import laplace
    import gpu_hodlr.laplace_torch

    posterior = laplace.Laplace(
        model, "classification", subset_of_weights="all", hessian_structure="gpu_hodlr"
    )
    posterior.fit(loader)
"""

from gpu_hodlr.applications.laplace.laplace_torch import CompressedLaplace

__all__ = ["CompressedLaplace"]
