#!/usr/bin/env bash
# A time line of a command on a GPU, and what took how long by NVTX range and by kernel.
#
#   profiling/nsys_profile.sh                  roofline.py on the kernel matrix of 131,072 points
#   profiling/nsys_profile.sh python -m gpu_hodlr table --device cuda --net mnist
#
# REPORT: the report's file without its ending (default nsys_report in this folder).
# GRAPHS: node shows the kernels inside a CUDA graph, graph (less overhead) each graph as a whole.
# How to read the result: profiling/README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
report=${REPORT:-nsys_report}
graphs=${GRAPHS:-node}

if ! command -v nsys >/dev/null; then
  echo "nsys is not installed: get NVIDIA Nsight Systems (https://developer.nvidia.com/nsight-systems," \
    "or nsight-systems-cli from NVIDIA's package repository)" >&2
  exit 2
fi
if ! "$python" -c 'import nvtx' 2>/dev/null; then
  echo "the Python package nvtx is not installed, without it there are no ranges:" \
    "pip install 'gpu-hodlr[nvtx]'" >&2
  exit 2
fi
if [ $# -eq 0 ]; then
  set -- "$python" "$here/roofline.py" --device cuda --matrix kernel --n 131072 --repeats 3
fi

nsys profile --trace=cuda,nvtx,cublas --cuda-graph-trace="$graphs" \
  --force-overwrite=true --output="$report" "$@"
nsys stats --force-export=true \
  --report nvtx_gpu_proj_sum --report nvtx_sum --report cuda_gpu_kern_sum "$report.nsys-rep"
