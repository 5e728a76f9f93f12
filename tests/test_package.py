"""The package as a guest in somebody's process: what import brings, forks, leaks, memory, explanations."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import attnx
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
        x = torch.ones(1, 1, 4, 8)
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
    assert {"compiler", "cuda", "cuda_architectures", "torch_target"} <= info.keys()


class Attend(torch.utils.data.Dataset[Tensor]):
    """Computes attention inside the workers of a DataLoader."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        inputs, _ = random_inputs(Shape(length_k=100), torch.float32, torch.device("cpu"), seed=index)
        return attnx.sigmoid_attention(**inputs)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_works_in_child_processes(start: str) -> None:
    """After use in the parent, whose thread pool a fork does not carry over."""
    expected = [Attend()[i] for i in range(4)]
    loader = DataLoader(Attend(), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=60)
    for got, want in zip(loader, expected, strict=True):
        assert torch.equal(got, want)


def growth_of_memory(call: Callable[[], object], calls: int = 300) -> int:
    """By how many bytes the process grows over ``calls`` calls, once the first ones have filled the pools."""
    for _ in range(30):
        call()
    gc.collect()
    before = psutil.Process().memory_info().rss
    for _ in range(calls):
        call()
    gc.collect()
    return psutil.Process().memory_info().rss - before


LEAK = Shape(heads=4, length_q=128, length_k=128, head_dim=32)  # 64 KiB each of query, key, value and output


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_leak(operator: str) -> None:
    inputs, grad_output = random_inputs(LEAK, torch.float32, torch.device("cpu"))
    attention = getattr(attnx, operator)
    assert growth_of_memory(lambda: forward_backward(attention, inputs, grad_output)) < 8 * 2**20


def test_a_leak_would_show() -> None:
    """Keeping the results of each call is more than the bound."""
    inputs, grad_output = random_inputs(LEAK, torch.float32, torch.device("cpu"))
    kept: list[dict[str, Tensor]] = []
    leak = lambda: kept.append(forward_backward(attnx.sigmoid_attention, inputs, grad_output))  # noqa: E731
    assert growth_of_memory(leak) > 8 * 2**20


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_is_linear_in_length(operator: str) -> None:
    """16384 tokens, forward and backward: one score matrix would be 1 GiB, all tensors together are 32 MiB."""
    code = f"""
        import pathlib, torch, attnx
        def peak():
            status = pathlib.Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        def step(length):
            x = torch.randn(1, 1, length, 64, dtype=torch.bfloat16, requires_grad=True)
            attnx.{operator}(x, x, x).backward(torch.ones_like(x))
        step(64)
        before = peak()
        step(16384)
        print(peak() - before)
    """
    assert int(run_python(code)) < 96 * 2**20


@pytest.mark.parametrize("operator", OPERATORS)
def test_explain_a_supported_call(operator: str) -> None:
    inputs, _ = random_inputs(Shape(), torch.float32, torch.device("cpu"))
    explanation = attnx.explain(getattr(attnx, operator), *inputs.values(), is_causal=True)
    assert explanation.supported
    assert explanation.backend == "cpu"
    assert str(explanation).startswith(f"{operator}: {explanation.kernel}")
    assert explanation.reasons
    assert explanation.nearest is None


@pytest.mark.parametrize(
    ("head_dim", "dtype", "device", "missing"),
    [
        (300, torch.float32, "cpu", "head_dim 300"),
        (16, torch.int32, "cpu", "dtype int32"),
        (16, torch.float32, "meta", "backend meta"),
    ],
)
def test_explain_an_unsupported_call(head_dim: int, dtype: torch.dtype, device: str, missing: str) -> None:
    inputs, _ = random_inputs(Shape(head_dim=head_dim), torch.float32, torch.device("cpu"))
    explanation = attnx.explain(attnx.sigmoid_attention, *(x.to(device, dtype) for x in inputs.values()))
    assert not explanation.supported
    assert explanation.kernel is None
    assert any(f"missing: {missing}" in reason for reason in explanation.reasons)
    assert explanation.nearest is not None
    assert "backend cpu" in explanation.nearest
    assert all(reason in str(explanation) for reason in explanation.reasons)
