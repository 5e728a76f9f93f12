"""No CUDA operator reads or writes device memory on the host, waits for the device, or allocates: all of them enqueue.

On the emulator device memory is host memory, so that the first would go unnoticed there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnx

HERE = Path(__file__).parent

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.usefixtures("backend")]

# What may be called while a stream is captured.
ENQUEUES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cudaMemsetAsync"}
ASKS = {
    "cudaDeviceGetAttribute",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetDeviceCount",
    "cudaGetDriverEntryPointByVersion",
    "cudaGetErrorName",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "cudaPeekAtLastError",
    "cudaSetDevice",
}

# It prints each operator that was called, how often, and how often its host code touched the memory of tensors.
WORKER = """
import ctypes, sys
from collections import Counter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import emulated_worker as worker

library = ctypes.CDLL(None)
library.host_touches.restype, library.first_host_touch.restype = ctypes.c_long, ctypes.c_char_p
calls, touches = Counter(), Counter()

class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace != "attnx":
            return op(*args, **(kwargs or {}))
        before = library.host_touches()
        library.watch_memory(1)
        try:
            return op(*args, **(kwargs or {}))
        finally:
            library.watch_memory(0)
            calls[op._opname] += 1
            touches[op._opname] += library.host_touches() - before

kinds = {
    "dense": worker._dense, "varlen": worker._varlen, "decode": worker._decode, "block_sparse": worker._block_sparse,
    "probabilistic": worker._large_blocks, "routing": worker._routing, "argmax": worker._argmax_routing,
}
with Watched():
    for name in sys.argv[1:]:
        if name in kinds:
            kinds[name]("softmax", torch.bfloat16, 64)
        elif name == "sparse_linear":
            list(worker._sparse_linear([64]))
        else:
            worker.staircase(torch.bfloat16, 64, (16, 8, 4, 2))
for name, count in calls.items():
    print(name, count, touches[name], library.first_host_touch().decode().replace(" ", ""))
"""

# What runs, and the operators that it calls.
CALLS = {
    "dense": {"softmax_attention", "softmax_attention_backward"},
    "varlen": {"softmax_attention_varlen", "softmax_attention_varlen_backward"},
    "decode": {"softmax_attention"},
    "block_sparse": {"block_sparse_attention", "block_sparse_attention_backward"},
    "probabilistic": {"probabilistic_attention", "probabilistic_attention_backward"},
    "sparse_linear": {"sparse_linear_attention", "sparse_linear_attention_backward"},
    "routing": {"route", "routing_attention", "routing_attention_backward"},
    "argmax": {"route", "routing_attention", "update_centroids_"},
    "staircase": {"staircase_append_", "staircase_crop_", "staircase_dequantize", "staircase_attention"},
}


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("library") / "libdevice_memory.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-shared", "-fPIC", "-o", library]
    subprocess.run([*command, HERE / "device_memory.cpp"], check=True)
    return f"{library}:libcudart.so.13"


def touches(call: str, preloaded: str, **environment: str) -> dict[str, tuple[int, str]]:
    """Tells by operator how often its host code touched a tensor's memory, and where first."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, call],
        env=os.environ | {"LD_PRELOAD": preloaded, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    return {name: (int(touched), where) for name, _, touched, where in lines}


@pytest.mark.parametrize("call", CALLS)
def test_the_host_touches_no_device_memory(call: str, preloaded: str) -> None:
    found = touches(call, preloaded, ATTNX_HOST_UNREAD="1")
    assert found.keys() >= CALLS[call]
    assert {name: x for name, x in found.items() if x[0]} == {}


def test_a_touch_is_seen(preloaded: str) -> None:
    """Where checks look at values in host memory, which they do on the host, this is counted."""
    found = touches("staircase", preloaded)
    assert all(found[name][0] > 0 for name in CALLS["staircase"]), found
    assert "libattnx" in found["staircase_append_"][1]


def test_the_library_calls_nothing_that_waits_or_allocates() -> None:
    library = Path(attnx.__file__).parent / "libattnx.so"
    table = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    called = {line.split()[-1].partition("@")[0] for line in table.splitlines()}
    of_cuda = {name for name in called if name.startswith("cuda")}
    assert of_cuda - ENQUEUES - ASKS == set()
    assert "cudaLaunchKernel" in of_cuda
