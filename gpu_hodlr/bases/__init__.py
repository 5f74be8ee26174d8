"""Nested bases: samplers of block rows, and the bottom-up sweeps that build a form from them."""

from gpu_hodlr.bases.entry_sampler import ENTRY_LIMIT, EntrySampler
from gpu_hodlr.bases.products_only import real_blocks, sweep_products_only
from gpu_hodlr.bases.regions import FarField, NestedRegion, Outside, Region, Sibling
from gpu_hodlr.bases.samplers import (
    FIRST_COLUMNS,
    LevelSampler,
    ProductSampler,
    Sampler,
    samples_for,
)
from gpu_hodlr.bases.sweep import bases_of_level, sweep, sweep_far

__all__ = [
    "ENTRY_LIMIT",
    "FIRST_COLUMNS",
    "EntrySampler",
    "FarField",
    "LevelSampler",
    "NestedRegion",
    "Outside",
    "ProductSampler",
    "Region",
    "Sampler",
    "Sibling",
    "bases_of_level",
    "real_blocks",
    "samples_for",
    "sweep",
    "sweep_far",
    "sweep_products_only",
]
