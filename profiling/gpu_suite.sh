#!/usr/bin/env bash
# Everything a session with a GPU should run. A step that fails does not keep the next from running.
#
#   profiling/gpu_suite.sh                     all steps, 24 minutes at most (the limits' sum)
#   profiling/gpu_suite.sh tests kernel_1m     some of them
#
# RESULTS: folder of the JSON files (default profiling/results). Needs the extras cuda12 or cuda13,
# and test. The exit status is 0 when every step went well.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python}
results=${RESULTS:-profiling/results}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$results"

roofline() { # step, options of roofline.py
  "$python" profiling/roofline.py --device cuda --json "$results/gpu_roofline_$1.json" "${@:2}"
}
step() { # name
  case $1 in
    tests) "$python" -m pytest -m gpu -n 0 ;;
    mnist) roofline mnist --matrix mnist ;;
    enco) roofline enco --matrix enco ;;
    kernel_16k) roofline kernel_16k --n 16384 ;;
    kernel_128k) roofline kernel_128k --n 131072 ;;
    kernel_128k_float32) roofline kernel_128k_float32 --n 131072 --dtype float32 ;;
    kernel_1m) roofline kernel_1m --n 1048576 --repeats 3 ;;
    table) "$python" -m gpu_hodlr table --device cuda --json "$results/gpu_table.json" ;;
    growth) "$python" profiling/complexity.py --device cuda --json "$results/gpu_complexity.json" ;;
  esac
}
# seconds each step may take
declare -A limits=([tests]=420 [mnist]=90 [enco]=120 [kernel_16k]=60 [kernel_128k]=90
  [kernel_128k_float32]=90 [kernel_1m]=240 [table]=210 [growth]=120)
all=(tests mnist enco kernel_16k kernel_128k kernel_128k_float32 kernel_1m table growth)

if [ "${1-}" = --step ]; then # a step in a process of its own, for `timeout`
  step "$2"
  exit
fi
if [ $# -eq 0 ]; then
  set -- "${all[@]}"
fi
for name in "$@"; do
  if [ -z "${limits[$name]-}" ]; then
    echo "there is no step $name; steps: ${all[*]}" >&2
    exit 2
  fi
done
"$python" - <<'PY' || exit 2
import sys
from gpu_hodlr.devices import gpu_name, resolve_device
from gpu_hodlr.errors import DeviceError
try:
    print("on", gpu_name(resolve_device("cuda")))
except DeviceError as error:
    sys.exit(str(error))
PY

summary=()
failed=0
for name in "$@"; do
  echo "=== $name (${limits[$name]} s at most)"
  start=$SECONDS
  status=0
  timeout --kill-after=10 "${limits[$name]}" bash "$root/profiling/gpu_suite.sh" --step "$name" || status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="out of time" failed=1 ;;
    *) verdict="FAILED ($status)" failed=1 ;;
  esac
  summary+=("$(printf '%-20s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")")
done
echo "=== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
