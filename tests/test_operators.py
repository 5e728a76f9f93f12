"""Every operator of torch.ops.attnx has a row in the table, and through it all that torch must know of it."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx._operators.description import BackwardOperator, NoDerivative, Operator
from attnx._operators.schema import signature
from attnx._operators.table import OPERATORS
from calls import every_operator, of_operator
from cases import Shape, random_inputs
from test_package import run_python

NAMES = sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("attnx::"))
ROWS = {name: row for row in OPERATORS for name in row.names}

VALUES: dict[str, Any] = {"int": 1, "SymInt": 1, "float": 1.0, "bool": False, "str": "softmax", "List[int]": [1]}
# Few of these are served, or they say what the results are.
SHAPES = {"log_decay": (1, 1, 4), "beta": (1, 1, 4)}  # of tensors that are no (batch, heads, length, dim)
CHOICES: dict[str, Any] = {"block_q": 64, "block_k": 64, "family": "harmonic", "density": 0.5}


def arguments_of(name: str, device: str = "cpu", requires_grad: bool = False) -> dict[str, Any]:
    """Values of the right types, which no kernel would take."""

    def value(x: torch._C.Argument) -> Any:
        if str(x.type) == "Tensor":
            return torch.zeros(SHAPES.get(x.name, (1, 1, 4, 8)), device=device, requires_grad=requires_grad)
        return CHOICES.get(x.name, VALUES.get(str(x.type)))  # None where that will do

    return {x.name: value(x) for x in signature(name).operator._schema.arguments}


def results_of(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    results = signature(name).call(arguments)
    return results if isinstance(results, tuple) else (results,)


@pytest.fixture(scope="module")
def arguments_of_all(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    return every_operator(dtype, device)


def arguments_without_gradient(name: str) -> list[str]:
    """The tensors that an operator differentiates by none, in order."""
    given = signature(f"{name}_backward").results
    return [x for x, value in arguments_of(name).items() if isinstance(value, Tensor) and f"grad_{x}" not in given]


def test_every_operator_has_one_row() -> None:
    assert sorted(ROWS) == NAMES
    assert sum(len(row.names) for row in OPERATORS) == len(NAMES)


@pytest.mark.parametrize("row", OPERATORS, ids=lambda row: row.name)
def test_rows_name_what_exists(row: Operator) -> None:
    arguments = {argument for name in row.names for argument in signature(name).arguments}
    results = {result for name in row.names for result in signature(name).results}
    assert set(row.autocast) <= arguments
    assert set(row.shapes) <= results
    for name in row.forward_names if isinstance(row.derivative, BackwardOperator) else ():
        for result in signature(f"{name}_backward").results:
            assert result.removeprefix("grad_") in signature(name).arguments


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_registered(name: str) -> None:
    row = ROWS[name]

    def registered(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"attnx::{name}", key)

    assert registered("Meta")
    assert registered("CompositeExplicitAutograd")
    assert registered("Autograd")
    assert registered("FuncTorchBatched")
    assert registered("ADInplaceOrView") == bool(signature(name).written)
    for key in ("AutocastCPU", "AutocastCUDA"):
        assert registered(key) == (bool(row.autocast) and name in row.forward_names)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].implementation is None])
def test_other_devices_are_refused(name: str) -> None:
    """The refusal awaits the tensors of another backend; this reaches it with those of the CPU."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    with pytest.raises(NotImplementedError, match=r"(?s)^\w+: no kernel for this call.*supported: .*backend"):
        signature(name).operator.redispatch(keys, *arguments_of(name).values())


@pytest.mark.parametrize("name", NAMES)
def test_derivative_or_refusal(name: str) -> None:
    """Tensors are on meta, where shapes are all there is."""
    row, arguments = ROWS[name], arguments_of(name, "meta", requires_grad=True)
    if isinstance(row.derivative, BackwardOperator) and name in row.forward_names:
        for argument in arguments_without_gradient(name):
            with pytest.raises(RuntimeError, match=f"^{argument}: expected a tensor that needs no gradient"):
                results_of(name, arguments)
            arguments[argument] = arguments[argument].detach()
    if isinstance(row.derivative, NoDerivative) and signature(name).written:
        with pytest.raises(NotImplementedError, match=f"^{name}: no derivative; {row.derivative.why}"):
            results_of(name, arguments)
        return
    results = [x for x in results_of(name, arguments) if isinstance(x, Tensor) and x.requires_grad]
    total = sum((x.sum() for x in results), torch.zeros((), device="meta", requires_grad=True))
    if isinstance(row.derivative, NoDerivative):
        assert all(x.requires_grad == x.is_floating_point() for x in results)
        if results:
            with pytest.raises(NotImplementedError, match=f"^{name}: no derivative; {row.derivative.why}"):
                total.backward()
    elif name not in row.forward_names:
        with pytest.raises(NotImplementedError, match=f"^{name.removesuffix('_backward')}: no second derivative"):
            total.backward()
    else:
        total.backward()
        first = next(iter(arguments.values()))
        assert first.grad.shape == first.shape


TENSORS = [
    (name, argument)
    for name in NAMES
    for argument in (x.name for x in signature(name).operator._schema.arguments if "Tensor" in str(x.type))
    if len([x for x in arguments_of(name).values() if isinstance(x, Tensor)]) > 1
]


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_one_tensor_elsewhere_is_refused(name: str, argument: str) -> None:
    """Among real tensors one on meta would turn the call into one that computes shapes alone. The fallback of other
    devices asks the same."""
    arguments = arguments_of(name)
    arguments[argument] = torch.zeros(1, 1, 4, 8, device="meta")
    first = "query" if "query" in arguments else next(iter(arguments))
    named, expected = (r"\w+", "meta") if argument == first else (argument, "cpu")
    elsewhere = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    calls = (
        lambda: signature(name).call(arguments),
        lambda: signature(name).operator.redispatch(elsewhere, *arguments.values()),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=f"^{named}: expected a tensor on {expected} like {first}, got one on "):
            call()


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_kernels_ask_for_one_device_too(
    name: str, argument: str, arguments_of_all: dict[str, tuple[Any, ...]], device: torch.device
) -> None:
    """A call that reaches a kernel with one tensor elsewhere is refused by the same rule, before it reads any."""
    arguments = signature(name).bind(of_operator(name, arguments_of_all))
    if not isinstance(arguments[argument], Tensor):
        arguments[argument] = torch.zeros(1, 1, 4, 8)
    arguments[argument] = arguments[argument].to("meta")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"attnx::{name}", device.type.upper()):
        assert ROWS[name].implementation is not None  # plain PyTorch, which the fallback checks
        return
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.type.upper()))
    with pytest.raises(RuntimeError, match=r"^\w+: expected a tensor on .* like \w+, got one on "):
        signature(name).operator.redispatch(keys, *arguments.values())


@pytest.mark.parametrize("name", [name for name in NAMES if signature(name).written])
def test_changes_are_counted(name: str) -> None:
    """Autograd refuses a backward that needs a tensor as it was."""
    arguments = arguments_of(name, "meta")
    signature(name).call(arguments)
    versions = {argument: x._version for argument, x in arguments.items() if isinstance(x, Tensor)}
    assert versions == {argument: int(argument in signature(name).written) for argument in versions}


@pytest.mark.backends("cpu")
def test_default_device_does_not_move_a_cache(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_k=10, heads=2, kv_heads=2, head_dim=32), torch.float32, device)
    cache = attnx.StaircaseCache(1, 2, 32, 200, device=device)
    cache.append(inputs["key"], inputs["key"])
    with torch.device("meta"):
        cache.crop(7)
    assert cache.length == 7


@pytest.mark.backends("cpu")
def test_block_sparse_under_vmap_is_a_loop(device: torch.device) -> None:
    inputs, _ = random_inputs(Shape(length_q=128, length_k=128, head_dim=8), torch.float32, device)
    mask = attnx.BlockMask.from_dense(torch.tensor([[[[True, False], [True, True]]]]))
    several = [torch.stack((x, 2 * x)) for x in inputs.values()]

    def attention(*inputs: Tensor) -> Tensor:
        output = attnx.block_sparse_attention(*inputs, mask)
        assert isinstance(output, Tensor)
        return output

    expected = torch.stack([attention(*x) for x in zip(*several, strict=True)])
    assert torch.equal(torch.vmap(attention)(*several), expected)


NEW_ARGUMENT = """
import torch
from attnx import _operators
from attnx._operators.description import Operator
from attnx._operators.schema import LIBRARY

# Sinks are logits without a value. The row says nothing of them: the schemas do.
QKV = "Tensor query, Tensor key, Tensor value"
LIBRARY.define(f"example({QKV}, Tensor? sink, float scale) -> (Tensor output, Tensor logsumexp)")
LIBRARY.define(f"example_backward(Tensor grad_output, Tensor grad_logsumexp, {QKV}, Tensor logsumexp, Tensor? sink, "
               "float scale, bool deterministic) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, "
               "Tensor grad_sink)")

def formula(query, key, value, sink, scale):
    logits = scale * query @ key.mT
    if sink is not None:
        logits = torch.cat((logits, sink.view(-1, 1, 1).expand(*logits.shape[:3], 1)), -1)
    logsumexp = logits.logsumexp(-1)
    weights = (logits - logsumexp[..., None]).exp()[..., :key.shape[2]]
    return weights.to(value.dtype) @ value, logsumexp.float()

def backward(grad_output, grad_logsumexp, query, key, value, logsumexp, sink, scale, deterministic):
    weights = (scale * query @ key.mT - logsumexp[..., None]).exp()
    of_weights = grad_output @ value.mT
    rows = grad_logsumexp - (of_weights * weights).sum(-1)
    of_logits = scale * weights * (of_weights + rows[..., None])
    sinks = 0 if sink is None else (sink.view(-1, 1) - logsumexp).exp()
    return of_logits @ key, of_logits.mT @ query, weights.mT @ grad_output, (sinks * rows).sum((0, 2))

LIBRARY.impl("example", formula, "CPU")
LIBRARY.impl("example_backward", backward, "CPU")
_operators.register(Operator("example", vmap="heads", autocast=("query", "key", "value")))

example, (heads, length) = torch.ops.attnx.example.default, (3, 5)
inputs = [torch.randn(2, heads, length, 4, requires_grad=True) for _ in range(3)]
for shape in ((heads,), ()):
    sink = torch.randn(shape, requires_grad=True)
    torch.library.opcheck(example, (*inputs, sink, 0.5))
    results = torch.autograd.grad(example(*inputs, sink, 0.5)[0].sum(), (*inputs, sink))
    expected = torch.autograd.grad(formula(*inputs, sink, 0.5)[0].sum(), (*inputs, sink))
    for x, y in zip(results, expected, strict=True):
        torch.testing.assert_close(x, y)
    several = [torch.stack((x, 2 * x)).detach() for x in (*inputs, sink)]
    mapped = torch.vmap(lambda *x: example(*x, 0.5)[0])(*several)
    torch.testing.assert_close(mapped, torch.stack([example(*x, 0.5)[0] for x in zip(*several)]))
torch.library.opcheck(example, (*inputs, None, 0.5))
with torch.autocast("cpu", torch.bfloat16):  # which leaves the sinks as they are
    output = example(*inputs, sink, 0.5)[0]
assert torch.equal(output, example(*(x.bfloat16() for x in inputs), sink, 0.5)[0])
"""


@pytest.mark.backends("cpu")
def test_a_number_for_each_head_needs_no_entry(device: torch.device) -> None:
    """A softmax with sinks, in plain PyTorch: gradient, shapes, batching and compilation of ``sink`` follow."""
    run_python(textwrap.dedent(NEW_ARGUMENT))
