"""torch.func and forward-mode differentiation: an operator either takes part in a transform or refuses by its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import attnx
from attnx import reference
from attnx._operators.schema import signature
from calls import Call, differentiable_calls, every_operator, has_kernel, of_operator
from cases import Shape, random_inputs
from test_operators import NAMES

JVP = ("sigmoid_attention_jvp", "softmax_attention_jvp")
# What calls softmax attention itself may pass it the tangent, for which CUDA has no kernel.
NO_TANGENT = r"^\w+: no (forward-mode derivative|kernel for this call)"
FUNCTIONS = list(differentiable_calls(torch.float32, torch.device("cpu")))


@pytest.fixture
def call(request: pytest.FixtureRequest, dtype: torch.dtype, device: torch.device) -> Call:
    return of_operator(request.param, differentiable_calls(dtype, device))


def loss_of(call: Call) -> Callable[..., Tensor]:
    return lambda *inputs: call.function(**dict(zip(call.inputs, inputs, strict=True))).float().sin().sum()


@pytest.mark.parametrize("call", FUNCTIONS, indirect=True)
def test_grad(call: Call) -> None:
    """The bits of torch.autograd."""
    leaves = [x.clone().requires_grad_() for x in call.inputs.values()]
    wanted = tuple(range(len(leaves)))
    expected = torch.autograd.grad(loss_of(call)(*leaves), leaves, allow_unused=True, materialize_grads=True)
    for name, x, y in zip(call.inputs, torch.func.grad(loss_of(call), wanted)(*leaves), expected, strict=True):
        assert torch.equal(x, y), name


EXAMPLES = [name for name in FUNCTIONS if "varlen" not in name and not name.startswith("move_")]


@pytest.mark.parametrize("call", EXAMPLES, indirect=True)
def test_gradients_of_each_sample(call: Call) -> None:
    """vmap(grad) of a batch of calls, in which all inputs have examples."""
    samples = [torch.stack((x, x.flip(-1))) for x in call.inputs.values()]
    gradient = torch.func.grad(loss_of(call), tuple(range(len(samples))))
    several = torch.func.vmap(gradient)(*samples)
    for i in range(2):
        for name, x, y in zip(call.inputs, several, gradient(*(x[i] for x in samples)), strict=True):
            torch.testing.assert_close(x[i], y, msg=name)


@pytest.mark.parametrize("call", ["move_centroids_in_backward"], indirect=True)
def test_what_changes_its_arguments_refuses_vmap(call: Call) -> None:
    samples = [torch.stack((x, x)) for x in call.inputs.values()]
    with pytest.raises(NotImplementedError, match=r"^update_centroids_: no vmap, as it changes centroids and counts"):
        torch.func.vmap(torch.func.grad(loss_of(call)))(*samples)


def test_jacobian(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(length_q=3, length_k=4, head_dim=5), dtype, device)

    def output(query: Tensor) -> Tensor:
        return attnx.softmax_attention(query, inputs["key"], inputs["value"])

    jacobian = torch.func.jacrev(output)(inputs["query"])
    expected = torch.stack(
        [
            torch.func.vjp(output, inputs["query"])[1](one.view(1, 2, 3, 5).to(device, dtype))[0]
            for one in torch.eye(2 * 3 * 5)
        ]
    )
    torch.testing.assert_close(jacobian.reshape(expected.shape), expected)


def test_grad_of_grad_is_refused(device: torch.device, dtype: torch.dtype) -> None:
    inputs, _ = random_inputs(Shape(), dtype, device)

    def loss(query: Tensor) -> Tensor:
        return attnx.softmax_attention(query, inputs["key"], inputs["value"]).float().sum()

    with pytest.raises(NotImplementedError, match=r"^softmax_attention: no second derivative"):
        torch.func.grad(lambda query: torch.func.grad(loss)(query).float().sum())(inputs["query"])


@pytest.fixture(scope="module")
def arguments_of_all(dtype: torch.dtype, device: torch.device) -> dict[str, tuple[object, ...]]:
    return every_operator(dtype, device)


def test_all_operators_are_called(arguments_of_all: dict[str, tuple[object, ...]], device: torch.device) -> None:
    lacking = tuple(x for x in JVP if not has_kernel(x, device))
    assert sorted(arguments_of_all) == sorted(name for name in NAMES if not name.startswith(lacking))


def _refusal(name: str, argument: str) -> str:
    return f"^{name}: no forward-mode derivative.*, got a tangent of {argument};"


@pytest.mark.parametrize("name", NAMES)
def test_tangents_are_refused(name: str, arguments_of_all: dict[str, tuple[object, ...]]) -> None:
    """Each operator says of each of its arguments that a tangent does not pass, or not beside the others."""
    for i, argument in enumerate(signature(name).arguments):
        arguments = list(of_operator(name, arguments_of_all))
        x = arguments[i]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        with forward_ad.dual_level():
            arguments[i] = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(NotImplementedError, match=_refusal(name, argument)):
                signature(name).operator(*arguments)


@pytest.mark.parametrize(
    "transform",
    [lambda f, x: torch.func.jvp(f, (x,), (x,)), torch.func.linearize],
    ids=["jvp", "linearize"],
)
@pytest.mark.parametrize("call", FUNCTIONS, indirect=True)
def test_forward_transforms_are_refused(call: Call, transform: Callable[..., object]) -> None:
    query, *others = call.inputs.values()
    with pytest.raises(NotImplementedError, match=NO_TANGENT):
        transform(lambda query: loss_of(call)(query, *others), query)


@pytest.mark.parametrize("call", FUNCTIONS, indirect=True)
def test_forward_over_reverse_is_refused(call: Call) -> None:
    """The tangents reach the operators through the gradient's level, and none is lost on the way."""
    query, *others = call.inputs.values()
    gradient = torch.func.grad(lambda query: loss_of(call)(query, *others))
    with pytest.raises(NotImplementedError, match=NO_TANGENT):
        torch.func.jvp(gradient, (query,), (query,))


def test_reference_has_forward_mode(device: torch.device) -> None:
    """The reference has what the message says."""
    inputs, _ = random_inputs(Shape(), torch.float64, device)
    query = inputs.pop("query")
    _, tangent = torch.func.jvp(lambda query: reference.softmax_attention(query, **inputs), (query,), (query,))
    assert tangent.abs().max() > 0
