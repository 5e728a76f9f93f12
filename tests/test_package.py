"""The package as a guest in somebody's process: what import brings, forks, leaks, memory, explanations."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import attnx
from attnx import _capability
from backends import Backend
from calls import differentiable_calls, of_operator, run_the_others
from cases import OPERATORS, Shape, random_inputs
from compare import forward_backward


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints for ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    modules = json.loads(run_python("import attnx, json, sys; print(json.dumps(sorted(sys.modules)))"))
    heavy = {"matplotlib", "rich", "hypothesis", "pytest", "psutil", "attnx.demo", "attnx.testing", "torch._dynamo"}
    assert not heavy & set(modules)


def test_import_leaves_the_device_alone() -> None:
    code = """
        import torch, attnx
        x = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
        attnx.sigmoid_attention(x, x, x)
        print(torch.cuda.is_initialized())
    """
    assert run_python(code, CUDA_VISIBLE_DEVICES="").strip() == "False"


def test_import_leaves_torch_settings_alone() -> None:
    code = """
        import torch
        def settings():
            return torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled()
        before = settings()
        import attnx
        assert settings() == before
    """
    run_python(code)


def test_instruction_set_from_the_environment() -> None:
    code = "import attnx; print(attnx._C.cpu_instruction_set())"
    assert run_python(code, ATTNX_CPU_ISA="baseline").strip() == "baseline"


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected .*baseline.*got .*mmx"):
        attnx._C.set_cpu_instruction_set("mmx")


def test_build_info_is_complete() -> None:
    info = attnx._C.build_info()
    assert info["version"] == attnx.__version__ == attnx._C.version
    assert set(attnx._C.cpu_instruction_sets()) <= set(info["cpu_instruction_sets"])
    assert {"compiler", "cuda", "cuda_architectures", "cudart", "torch_target"} <= info.keys()
    assert (info["cuda"] is None) == (info["cudart"] is None) == (not info["cuda_architectures"])


@dataclass(frozen=True)
class Attend(torch.utils.data.Dataset[Tensor]):
    """Computes attention inside the workers of a DataLoader."""

    dtype: torch.dtype

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        inputs, _ = random_inputs(Shape(length_k=100), self.dtype, torch.device("cpu"), seed=index)
        return attnx.sigmoid_attention(**inputs)


@pytest.mark.backends("cpu", "emulated")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_works_in_child_processes(start: str, dtype: torch.dtype) -> None:
    """After use in the parent, whose thread pool a fork does not carry over."""
    data = Attend(dtype)
    expected = [data[i] for i in range(4)]
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start, timeout=60)
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)


def memory_in_use() -> int:
    """Bytes, on the host and the device."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what earlier tests have freed would hide a leak
    return psutil.Process().memory_info().rss + torch.cuda.memory_allocated()


def growth_of_memory(call: Callable[[], object], calls: int = 300) -> int:
    """By how many bytes the process grows over ``calls`` calls, once the first ones have filled the pools."""
    for _ in range(30):
        call()
    before = memory_in_use()
    for _ in range(calls):
        call()
    return memory_in_use() - before


LEAK = Shape(heads=16, length_q=64, length_k=64, head_dim=32)  # 64 KiB each, or 128, of query, key, value and output


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_leak(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(LEAK, dtype, device)
    attention = getattr(attnx, operator)
    assert growth_of_memory(lambda: forward_backward(attention, inputs, grad_output)) < 8 * 2**20


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", [*differentiable_calls(torch.float32, torch.device("cpu")), "others"])
def test_no_leak_of_any(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Every operator, forward and backward, and those without one."""
    if name == "others":
        assert growth_of_memory(lambda: run_the_others(dtype, device)) < 8 * 2**20
        return
    function, inputs = of_operator(name, differentiable_calls(dtype, device))
    grad_output = torch.ones_like(function(**inputs))
    assert growth_of_memory(lambda: forward_backward(function, inputs, grad_output)) < 8 * 2**20


def test_a_leak_would_show(dtype: torch.dtype, device: torch.device) -> None:
    """Keeping the results of each call is more than the bound."""
    inputs, grad_output = random_inputs(LEAK, dtype, device)
    kept: list[dict[str, Tensor]] = []
    leak = lambda: kept.append(forward_backward(attnx.sigmoid_attention, inputs, grad_output))  # noqa: E731
    assert growth_of_memory(leak) > 8 * 2**20


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_is_linear_in_length(operator: str, backend: Backend) -> None:
    """Forward and backward of many tokens takes far less than one score matrix in float32."""
    length = 8192 if backend.name == "emulated" else 16384
    code = f"""
        import pathlib, torch, attnx
        def peak():
            if torch.cuda.is_initialized():
                return torch.cuda.max_memory_allocated()
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        def step(length):
            x = torch.randn(1, 1, length, 64, dtype=torch.bfloat16, device="{backend.device}", requires_grad=True)
            attnx.{operator}(x, x, x).backward(torch.ones_like(x))
        step(512)  # the kernels, loaded
        before = peak()
        step({length})
        print(peak() - before)
    """
    assert int(run_python(code)) < 4 * length**2 / 8


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain_a_supported_call(operator: str, dtype: torch.dtype, backend: Backend) -> None:
    inputs, _ = random_inputs(Shape(), dtype, backend.device)
    explanation = attnx.explain(getattr(attnx, operator), *inputs.values(), is_causal=True)
    assert explanation.supported
    assert explanation.backend == backend.kernels
    assert str(explanation).startswith(f"{operator}: {explanation.kernel}")
    assert explanation.reasons
    assert explanation.nearest is None


@pytest.mark.backends("cuda", "emulated")
def test_explain_names_the_cuda_kernel(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(head_dim=70), dtype, device)
    explanation = attnx.explain(attnx.sigmoid_attention, **inputs)
    assert explanation.kernel == "sigmoid_attention [sm80]"
    assert any("attnx_forward_sm80" in reason and "padded to 96" in reason for reason in explanation.reasons)


@pytest.mark.parametrize(
    ("head_dim", "other_dtype", "other_device", "missing"),
    [
        (300, None, None, "head_dim 300"),
        (16, torch.int32, None, "dtype int32"),
        (16, None, "meta", "backend meta"),
    ],
)
def test_explain_an_unsupported_call(
    head_dim: int,
    other_dtype: torch.dtype | None,
    other_device: str | None,
    missing: str,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    inputs, _ = random_inputs(Shape(head_dim=head_dim), dtype, backend.device)
    call = (x.to(other_device or backend.device, other_dtype or dtype) for x in inputs.values())
    explanation = attnx.explain(attnx.sigmoid_attention, *call)
    assert not explanation.supported
    assert explanation.kernel is None
    assert any(f"missing: {missing}" in reason for reason in explanation.reasons)
    assert explanation.nearest is not None
    assert f"backend {'cpu' if other_device else backend.kernels}" in explanation.nearest
    assert all(reason in str(explanation) for reason in explanation.reasons)


def test_a_build_without_cuda_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attnx._C, "build_info", lambda: {"cuda": None})
    requirement = _capability.Requirement("sigmoid_attention", "cuda", "bfloat16", (16,), (), False)
    row = _capability.nearest(requirement)
    assert row.backend == "cuda"
    assert requirement.missing(row) == ["CUDA kernels in this build of attnx"]


@pytest.mark.backends("cpu")
def test_cuda_on_host_needs_the_emulator(backend: Backend) -> None:
    """Where device memory is not host memory, or there are no kernels at all, CPU tensors are not for CUDA kernels."""
    code = """
        import torch, attnx
        x = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
        try:
            attnx.sigmoid_attention(x, x, x)
        except RuntimeError as error:
            print(error)
    """
    assert run_python(code, ATTNX_CUDA_ON_HOST="1").startswith("ATTNX_CUDA_ON_HOST: expected ")
