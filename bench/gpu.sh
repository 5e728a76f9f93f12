#!/usr/bin/env bash
# All that is asked of a GPU, in one command and without network: bench/gpu.sh OUT_DIR [PART...]
#
# All parts take up to 18 minutes, and named ones, besides the build, less: where a GPU is lent for 10 minutes, name
# "tests probabilistic sparse-linear summary" in a second call, and "routing staircase append summary" in a third.
#
# Builds for the GPU that is there, runs the tests on it, also under compute-sanitizer, measures attnx beside the peers
# that are installed and in deterministic mode, and trains 3,000 steps beside the plain formula. OUT_DIR gets
# <device>-<commit>.json, .md and two .png, drift-sigmoid-cuda.json, log.txt, and status.txt with a line a part. A part
# that fails or runs out of its time does not stop the others, but makes the exit status 1.
#
# It needs Python (or $PYTHON) with torch, pybind11, scikit-build-core, ninja, nvidia-cutlass (or its headers, by
# CMAKE_ARGS=-DATTNX_CUTLASS_INCLUDE_DIR=...), pytest, hypothesis, psutil, numpy, matplotlib and rich. Where the checkout
# has no .git, ATTNX_COMMIT names the commit.
set -uo pipefail
: "${1:?usage: bench/gpu.sh OUT_DIR [PART...]}"
out=$(mkdir -p "$1" && realpath "$1") || exit
asked=" ${*:2} "
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -f "$out/log.txt" "$out/status.txt"
failed=0

# part NAME SECONDS COMMAND...: runs it for at most so long, and keeps what it says and how it ends.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  [[ $asked == "  " || $name == build || $asked == *" $name "* ]] || return 0
  printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$out/log.txt"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed=1
  printf '%-12s exit %3d after %3d s of %d\n' "$name" "$status" $((SECONDS - start)) "$limit" >>"$out/status.txt"
}

bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" bench/run.py --device cuda --output "$work/runs" "$@"
}

sanitize() {
  # PyTorch's own allocator would hand out parts of larger blocks, and hide accesses between them.
  part "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-name kernel_substring=attnx_ \
    --report-api-errors no --error-exitcode 1 "$python" -m pytest -q -p no:cacheprovider -m smoke -k cuda
}

# A build has the kernels for sm_90a, too, where the GPU runs them.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || exit
part build 140 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$work/site" \
  --config-settings=build-dir="$work/build" --config-settings=cmake.define.ATTNX_CUDA=ON \
  --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES="$capability-real" \
  --config-settings=cmake.define.ATTNX_CUDA_SM90="$([[ $capability == 90 ]] && echo ON || echo OFF)" .
part compile 10 "$python" bench/compile_time.py "$work/build"
export PYTHONPATH=$work/site PYTHONDONTWRITEBYTECODE=1

workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
part tests 80 "$python" -m pytest -q -p no:cacheprovider -k cuda "${workers[@]}"
sanitize memcheck 40
sanitize racecheck 40

bench bfloat16 100 --suite flash --dtype bfloat16 --rounds 15
bench float16 20 --suite flash --dtype float16 --rounds 15 --case d128-4096
bench varlen 20 --suite varlen --dtype bfloat16 --rounds 15
bench deterministic 20 --suite deterministic --dtype bfloat16 --rounds 15
bench flex 40 --suite flex --dtype bfloat16 --rounds 15
bench probabilistic 60 --suite probabilistic-gpu --dtype bfloat16 --rounds 15
bench sparse-linear 60 --suite sparse-linear-gpu --dtype bfloat16 --rounds 15
bench routing 300 --suite routing-gpu --dtype bfloat16 --rounds 15
bench staircase 60 --suite staircase-gpu --dtype bfloat16 --rounds 15
part append 40 "$python" bench/append.py --device cuda --dtype bfloat16 --output "$out/append-cuda.json"
part drift 50 "$python" bench/drift.py --device cuda --output "$out"
part summary 20 "$python" bench/summary.py --output "$out" "$work"/runs/*.json

echo
cat "$out/status.txt"
exit "$failed"
