"""The operators inside PyTorch's own machinery: opcheck, compile, export, vmap, checkpointing, autocast, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import attnx
from calls import RecordedCalls
from cases import DTYPES, OPERATORS, Shape, pack, parameter_dtype, random_inputs, random_parameter
from compare import forward_backward
from memory import surrounded

SHAPE = Shape(batch=2, heads=4, kv_heads=2, length_q=9, length_k=12, head_dim=8, value_dim=5)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "compact": lambda x: x,
    "permuted": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
    "sliced": surrounded,
}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(
    operator: str, varlen: bool, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    """opcheck on every call that a forward and a backward make, the backward operators' included."""
    if varlen:
        inputs, grad_output, options = pack(([3, 0, 9], [4, 2, 9]), dtype, device)
        operator += "_varlen"
    else:
        (inputs, grad_output), options = random_inputs(SHAPE, dtype, device), {}
    inputs = {name: layout(x) for name, x in inputs.items()}
    inputs["alibi_slopes"] = random_parameter((4,), dtype, device)
    if "sigmoid" in operator:
        inputs["bias"] = random_parameter((4,), dtype, device)

    with RecordedCalls() as calls:
        forward_backward(getattr(attnx, operator), inputs, layout(grad_output), is_causal=True, **options)
    assert {op._opname for op, _, _ in calls.seen} == {operator, f"{operator}_backward"}
    for op, args, kwargs in calls.seen:
        torch.library.opcheck(op, args, kwargs)


def model(operator: str) -> Callable[..., Tensor]:
    """Attention with a projection before it and arithmetic after it, as a compiler meets it."""
    attention = getattr(attnx, operator)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        query, key, value = (x @ weight).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2).sin()

    return run


def model_inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 16, generator=generator)
    weight = torch.randn(16, 48, generator=generator) / 4
    return {"x": x.to(device, dtype), "weight": weight.to(device, dtype)}


@pytest.mark.parametrize("operator", OPERATORS)
def test_compile_once_for_all_lengths(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """One graph without breaks, compiled for dynamic sizes at the first call and never again."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model(operator), fullgraph=True, dynamic=True, backend=counter)
    for batch, length in ((2, 9), (3, 17), (5, 33)):
        inputs = model_inputs(batch, length, dtype, device)
        assert torch.equal(compiled(**inputs), model(operator)(**inputs))
    assert counter.frame_count == 1


@torch.compiler.config.patch(force_disable_caches=True)  # what an earlier build compiled says nothing of this one
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compile_forward_backward(operator: str, compiler: str, dtype: torch.dtype, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model(operator), fullgraph=True, dynamic=True, backend=compiler)
    for batch, length in ((2, 9), (3, 17)):
        inputs = model_inputs(batch, length, dtype, device)
        grad_output = torch.ones(batch, length, 16, dtype=dtype, device=device)
        expected = forward_backward(model(operator), inputs, grad_output)
        with torch.compiler.set_stance("default" if length == 9 else "fail_on_recompile"):
            results = forward_backward(compiled, inputs, grad_output)
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("wanted", [False, True], ids=["fast", "deterministic"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_backward_knows_whether_determinism_is_wanted(
    operator: str, wanted: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """What torch.use_deterministic_algorithms said is the operator's last argument, in eager mode and in a graph."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph)

    compiled = torch.compile(model(operator), fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    inputs, grad_output = model_inputs(2, 9, dtype, device), torch.ones(2, 9, 16, dtype=dtype, device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        with RecordedCalls() as calls:
            forward_backward(model(operator), inputs, grad_output)
        forward_backward(compiled, inputs, grad_output)
    finally:
        torch.use_deterministic_algorithms(before)
    name = f"{operator}_backward"
    assert [args[-1] for op, args, _ in calls.seen if op._opname == name] == [wanted]
    nodes = [node for graph in graphs for node in graph.graph.nodes if name in str(node.target)]
    assert [node.args[-1] for node in nodes] == [wanted]


@pytest.mark.parametrize("operator", OPERATORS)
def test_export(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return getattr(attnx, operator)(query, key, value, is_causal=True)

    inputs, _ = random_inputs(SHAPE, dtype, device)
    length = torch.export.Dim("length_k", min=2, max=4096)
    dynamic = {"query": {}, "key": {2: length}, "value": {2: length}}
    program = torch.export.export(Model(), (), inputs, dynamic_shapes=dynamic)
    longer, _ = random_inputs(Shape(batch=2, heads=4, kv_heads=2, length_q=9, length_k=31, head_dim=8), dtype, device)
    longer["value"] = longer["value"][..., :5]
    assert torch.equal(program.module()(**longer), Model()(**longer))


@pytest.mark.filterwarnings("error")  # PyTorch warns where vmap has no rule for an operator and loops instead
@pytest.mark.parametrize("operator", OPERATORS)
def test_vmap_is_a_loop(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    attention = getattr(attnx, operator)
    calls = [random_inputs(SHAPE, dtype, device, seed=i)[0] for i in range(3)]
    query, key, value = (torch.stack([call[name] for call in calls]) for name in calls[0])
    loop = torch.stack([attention(*call.values()) for call in calls])
    assert torch.equal(torch.vmap(attention)(query, key, value), loop)
    moved = torch.vmap(attention, in_dims=(2, 0, 0))(query.movedim(0, 2), key, value)
    assert torch.equal(moved, loop)
    shared = torch.vmap(attention, in_dims=(0, None, None))(query, key[0], value[0])
    assert torch.equal(shared, torch.stack([attention(q, key[0], value[0]) for q in query]))


@pytest.mark.parametrize("operator", OPERATORS)
def test_activation_checkpointing(operator: str, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    attention = getattr(attnx, operator)

    def checkpointed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return checkpoint(attention, query, key, value, use_reentrant=False)

    assert_equal(forward_backward(checkpointed, inputs, grad_output), forward_backward(attention, inputs, grad_output))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast(operator: str, varlen: bool, dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    """query, key and value are cast, also where they differ; the parameters and their gradients stay float32."""
    if varlen:
        inputs, _, options = pack(([5, 7], [6, 9]), torch.float32, device)
    else:
        (inputs, _), options = random_inputs(SHAPE, torch.float32, device), {}
    inputs["key"] = inputs["key"].to(dtype)
    parameters = {"alibi_slopes": random_parameter((4,), torch.float32, device)}
    if operator == "sigmoid_attention":
        parameters["bias"] = random_parameter((4,), torch.float32, device)
    attention = getattr(attnx, operator + ("_varlen" if varlen else ""))

    leaves = {name: x.requires_grad_() for name, x in (inputs | parameters).items()}
    with torch.autocast(device.type, dtype):
        output = attention(**leaves, **options)
    assert output.dtype == dtype
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in leaves.values()]

    cast = {name: x.detach().to(dtype) for name, x in inputs.items()} | {n: x.detach() for n, x in parameters.items()}
    expected = forward_backward(attention, cast, torch.ones_like(output), **options)
    assert torch.equal(output, expected["output"])
    for name, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, expected[f"grad_{name}"].to(gradient.dtype)), name


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_autocast_leaves_float64_alone(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = random_inputs(SHAPE, dtype, device)
    with torch.autocast(device.type, torch.bfloat16):
        assert getattr(attnx, operator)(**inputs).dtype == dtype


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_fakes_foretell(
    operator: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], kind: str, device: torch.device
) -> None:
    """Shape, dtype and strides of every result, forward and backward, without computing any."""
    inputs, grad_output = random_inputs(SHAPE, dtype, device)
    inputs = {name: layout(x) for name, x in inputs.items()}
    real = everything(operator, inputs, grad_output)
    if kind == "fake":
        with FakeTensorMode() as mode:
            foretold = everything(
                operator, {n: mode.from_tensor(x) for n, x in inputs.items()}, mode.from_tensor(grad_output)
            )
    else:
        foretold = everything(operator, {n: x.to("meta") for n, x in inputs.items()}, grad_output.to("meta"))
    for name, x in real.items():
        assert (foretold[name].shape, foretold[name].dtype) == (x.shape, x.dtype), name
        assert foretold[name].stride() == x.stride(), name


def everything(operator: str, inputs: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    results = forward_backward(getattr(attnx, operator), inputs, grad_output)
    if operator == "softmax_attention":
        results["logsumexp"] = attnx.softmax_attention(**inputs, return_logsumexp=True)[1]
        assert results["logsumexp"].dtype == parameter_dtype(grad_output.dtype)
    return results
