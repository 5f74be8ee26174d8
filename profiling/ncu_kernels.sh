#!/usr/bin/env bash
# Each kernel of a range on its own: its share of memory bandwidth and arithmetic, occupancy, stalls.
#
#   profiling/ncu_kernels.sh                   the kernels of products, in roofline.py
#   RANGE=solve profiling/ncu_kernels.sh
#   RANGE='pivoted QR' KERNELS='pivoted_qr.*' profiling/ncu_kernels.sh
#   profiling/ncu_kernels.sh python -m gpu_hodlr table --device cuda --net mnist
#
# RANGE: an NVTX range of gpu_hodlr, see profiling/README.md (default product; empty: everything).
# KERNELS: a regular expression of kernel names (default all).
# COUNT: kernels looked at (default 60; every one is run many times over).
# REPORT: the report's file without its ending (default ncu_report in this folder).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
range=${RANGE-product}
report=${REPORT:-ncu_report}

if ! command -v ncu >/dev/null; then
  echo "ncu is not installed: get NVIDIA Nsight Compute (https://developer.nvidia.com/nsight-compute," \
    "or cuda-nsight-compute from NVIDIA's package repository)" >&2
  exit 2
fi
if ! "$python" -c 'import nvtx' 2>/dev/null; then
  echo "the Python package nvtx is not installed, without it there are no ranges:" \
    "pip install 'gpu-hodlr[nvtx]'" >&2
  exit 2
fi
if [ $# -eq 0 ]; then
  set -- "$python" "$here/roofline.py" --device cuda --matrix kernel --n 131072 --repeats 1
fi

filter=()
if [ -n "$range" ]; then
  filter=(--nvtx --nvtx-include "gpu_hodlr@$range/") # the slash: a push/pop range
fi
# Graphs are taken apart: a kernel inside one is a node.
ncu --set detailed --graph-profiling node "${filter[@]}" \
  --kernel-name "regex:${KERNELS:-.*}" --launch-count "${COUNT:-60}" \
  --force-overwrite --export "$report" "$@"
ncu --import "$report.ncu-rep" --page details --print-summary per-kernel
