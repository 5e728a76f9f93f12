"""Every CUDA kernel under every schedule of the emulator, and under its race, initialisation and bounds checkers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent

pytestmark = [pytest.mark.backends("emulated"), pytest.mark.usefixtures("backend")]

Calls = dict[str, dict[str, Tensor]]

# The devices whose mainloops are tried.
MAINLOOPS = {
    "sm80": {"CUDAEMU_CC": "80"},
    "sm90": {"CUDAEMU_CC": "90", "ATTNX_CUDA_MAINLOOP": "sm90"},
}


def run_calls(folder: Path, **environment: str) -> Calls:
    """The results of all calls of emulated_worker.py, in a process with this environment."""
    file = folder / "results.pt"
    done = run_emulated(str(HERE / "emulated_worker.py"), str(file), **environment)
    assert done.returncode == 0, done.stderr[-8000:]
    assert "cudaemu:" not in done.stderr, done.stderr[:8000]
    return torch.load(file)


def run_emulated(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | MAINLOOPS["sm80"] | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module", params=MAINLOOPS)
def mainloop(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a process on a device that has this mainloop."""
    return MAINLOOPS[request.param]


@pytest.fixture(scope="module")
def lazy(mainloop: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """What every other run is compared with: copies complete as late as the program allows, and warps take turns."""
    return run_calls(tmp_path_factory.mktemp("lazy"), CUDAEMU_ASYNC="lazy", **mainloop)


@pytest.fixture(scope="module")
def registered_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose tensors the bounds checker knows."""
    library = tmp_path_factory.mktemp("library") / "libregistered_memory.so"
    source = HERE / "registered_memory.cpp"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": f"libcudart.so.13:{library}", "CUDAEMU_CHECK": "bounds"}


def assert_same(actual: Calls, expected: Calls, *, bitwise: bool = True) -> None:
    """Bit for bit, but for what atomics add up in no fixed order: that may be rounded differently."""
    assert actual.keys() == expected.keys()
    for call, results in expected.items():
        for name, x in results.items():
            rounding = 0.0
            if name.startswith("fast_") or not bitwise:
                rounding = 4 * torch.finfo(x.dtype).eps * x.abs().max().item()
            torch.testing.assert_close(
                actual[call][name], x, rtol=0, atol=rounding, msg=lambda text, at=f"{call}, {name}": f"{at}: {text}"
            )


@pytest.mark.parametrize("seed", [None, "1", "2", "3"], ids=["eager", "random-1", "random-2", "random-3"])
def test_schedule_changes_nothing(seed: str | None, lazy: Calls, mainloop: dict[str, str], tmp_path: Path) -> None:
    """Copies that complete at once or at any time, and warps that run in any order: where that shows, a wait lacks."""
    environment = {"CUDAEMU_ASYNC": "random", "CUDAEMU_SEED": seed} if seed else {"CUDAEMU_ASYNC": "eager"}
    assert_same(run_calls(tmp_path, **environment, **mainloop), lazy)


@pytest.mark.parametrize("checker", ["race", "globalrace", "init"])
def test_checker_is_content(checker: str, lazy: Calls, mainloop: dict[str, str], tmp_path: Path) -> None:
    assert_same(run_calls(tmp_path, CUDAEMU_CHECK=checker, **mainloop), lazy)


def test_bounds_checker_is_content(
    registered_memory: dict[str, str], lazy: Calls, mainloop: dict[str, str], tmp_path: Path
) -> None:
    """Inputs, results and workspaces are read and written within their bounds."""
    assert_same(run_calls(tmp_path, **registered_memory, **mainloop), lazy)


def test_bounds_checker_sees_memory_of_others(registered_memory: dict[str, str]) -> None:
    code = """
        import torch, attnx
        x = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16)
        attnx.sigmoid_attention(x, x, x)
        key = torch.frombuffer(bytearray(256), dtype=torch.bfloat16).view(x.shape)
        try:
            attnx.sigmoid_attention(x, key, x)
        except RuntimeError as error:
            print(error)
    """
    done = run_emulated("-c", "if True:" + code, **registered_memory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attnx_forward_sm80: CUDA error cudaErrorIllegalAddress")
    assert "out of bounds" in done.stderr


@pytest.mark.parametrize("compute_capability", ["86", "90"])
@pytest.mark.parametrize("mainloop", ["sm80"], indirect=True)
def test_other_devices(compute_capability: str, lazy: Calls, tmp_path: Path) -> None:
    """Less shared memory, or more, makes other tiles of the same mainloop."""
    calls = run_calls(tmp_path, CUDAEMU_CC=compute_capability, ATTNX_CUDA_MAINLOOP="sm80")
    assert_same(calls, {name: lazy[name] for name in calls}, bitwise=False)
