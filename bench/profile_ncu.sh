#!/usr/bin/env bash
# The Nsight Compute report of an operator's kernels, with source lines: bench/profile_ncu.sh OPERATOR [SHAPE ...]
#
# For example bench/profile_ncu.sh sigmoid_attention --length 16384 --causal --backward;
# python bench/one_call.py --help lists the rest. Needs attnx, built with ATTNX_CUDA_LINEINFO=ON, on Python's path and a
# GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
operator=${1:?usage: bench/profile_ncu.sh OPERATOR [SHAPE ...], see bench/one_call.py}
report=results/$operator.ncu-rep
mkdir -p results

# The clocks stay as they are: a locked base clock is not what a user gets, and may not be allowed.
ncu --profile-from-start off --kernel-name 'regex:^attnx_' --set full --import-source yes --source-folders csrc \
  --clock-control none --force-overwrite --export "$report" "${PYTHON:-python3}" bench/one_call.py "$@"
ncu --import "$report" --page details --print-summary per-kernel
echo "wrote $report; open it with ncu-ui, page Source"
