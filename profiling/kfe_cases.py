"""The benchmark's cases in the Kronecker-factored eigenbasis of a network, and their limits."""

from __future__ import annotations

from typing import Any

# Of `auto_choice.py`; mnist and enco are trained as in the founding tables.
NETWORKS = ("autoencoder", "small_autoencoder", "small_classifier")


def _compressed(network: str, rtol: float, max_rank: int = 512, **limits: float) -> dict[str, Any]:
    """A compression and products: nothing is factorized."""
    return {
        "matrix": (network, "float64"),
        "compress": {"scheme": "kfe", "rtol": rtol, "max_rank": max_rank},
        "factor": False,
        "limits": {"error": rtol, **limits},
    }


def _preconditioned(
    network: str,
    relative_damping: float,
    rtol: float,
    storage_fraction: float | None = None,
    **limits: float,
) -> dict[str, Any]:
    """CG on the exact matrix to 1e-8 for b = K w; the damping is relative to the mean diagonal.

    Only with b in the range of K are iterations those of the founding measurements (plain: 61 and
    159 of the autoencoder, 172 and 459 of the classifier). What the factor may store is given, and
    it chooses how.
    """
    return {
        "matrix": (network, "float64"),
        "compress": {"scheme": "kfe", "rtol": rtol},
        "factorize": {"shift": "auto", "storage_fraction": storage_fraction},
        "relative_damping": relative_damping,
        "in_range": True,
        "maxiter": 2000,
        "plain": True,
        "limits": {"residual": 1e-8, **limits},
    }  # fmt: skip


KFE_CASES: dict[str, dict[str, Any]] = {
    "kfe_enco_1e-1": _compressed("enco", 1e-1, stored_percent=0.01, compress_cpu_s=20),
    "kfe_enco_1e-2": _compressed(
        "enco", 1e-2, stored_percent=0.012, compress_cpu_s=30, product_ms=50
    ),
    "kfe_enco_1e-3": _compressed("enco", 1e-3, stored_percent=0.02, compress_cpu_s=60),
    "kfe_enco_9e-5": _compressed(
        "enco", 9e-5, stored_percent=1.2, compress_cpu_s=90, product_ms=400, peak_GB=6
    ),
    "kfe_enco_inverse": _preconditioned(
        "enco", 1e-3, 1e-3, 8e-5, factor_cpu_s=60, cg_share=0.25
    ),
    "kfe_mnist_1e-2": _compressed("mnist", 1e-2, stored_percent=1.4, compress_cpu_s=6),
    "kfe_mnist_1e-3": _compressed("mnist", 1e-3, stored_percent=4.3),
    "kfe_autoencoder_1e-3": _compressed("autoencoder", 1e-3, stored_percent=0.2),
    "kfe_cg_autoencoder_0.1": _preconditioned(
        "small_autoencoder", 0.1, 1e-3, 0.002, cg_iterations=13, factor_percent=0.2
    ),
    "kfe_cg_autoencoder_0.01": _preconditioned(
        "small_autoencoder", 0.01, 1e-3, 0.002, cg_iterations=32, factor_percent=0.2
    ),
    "kfe_cg_classifier_0.1": _preconditioned(
        "small_classifier", 0.1, 1e-2, 0.018, cg_iterations=37, factor_percent=1.8
    ),
    "kfe_cg_classifier_0.01": _preconditioned(
        "small_classifier", 0.01, 1e-2, 0.018, cg_iterations=101, factor_percent=1.8
    ),
    "kfe_cg_classifier_more_0.1": _preconditioned(
        "small_classifier", 0.1, 1e-2, 0.0257, cg_iterations=30, factor_percent=2.6
    ),
    "kfe_cg_classifier_more_0.01": _preconditioned(
        "small_classifier", 0.01, 1e-2, 0.0257, cg_iterations=81, factor_percent=2.6
    ),
}  # fmt: skip
