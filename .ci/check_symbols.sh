#!/usr/bin/env bash
# Kernels are compiled once per instruction set, and of a weak symbol the linker keeps one copy for all of them. So a
# weak symbol in an object compiled for AVX2 or newer must belong to that instruction set by name.
# Usage: check_symbols.sh FOLDER (where to build)
set -euo pipefail
build=$1/symbols
cmake -S . -B "$build" -G Ninja -DSKBUILD_PROJECT_VERSION=0.0.0 -DATTNX_CUDA=OFF \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" > "$build.log" || {
  cat "$build.log"
  exit 1
}
ninja -C "$build" attnx_cpu_avx2 attnx_cpu_avx512 attnx_cpu_avx512_bf16 > /dev/null
status=0
for isa in avx2 avx512 avx512_bf16; do
  # nm leaves some names of nested generic lambdas mangled: there a namespace stands after its length.
  stray=$(find "$build" -path "*attnx_cpu_$isa.dir*" -name '*.o' -exec nm -C {} + | grep -E ' [WVu] ' |
    grep -Ev "::$isa::|_Z.*${#isa}$isa" || true)
  if [ -n "$stray" ]; then
    printf 'weak symbols outside attnx::cpu::%s:\n%s\n' "$isa" "$stray"
    status=1
  fi
done
exit $status
