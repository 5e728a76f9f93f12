"""The gated delta rule against its definition, token by token in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnx
from attnx import reference
from attnx.testing import assert_close
from cases import parameter_dtype
from compare import forward_backward
from delta_rule_cases import DeltaShape, delta_inputs, plain_gated_delta_rule, with_state

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_ALL = pytest.mark.backends("cpu", "cuda", "emulated")
SHAPES = [
    DeltaShape(),
    DeltaShape(heads=1, value_heads=3, length=200, key_dim=17, value_dim=35),
    DeltaShape(batch=1, length=64, key_dim=128, value_dim=128),
    DeltaShape(length=65, key_dim=1, value_dim=1),
    DeltaShape(batch=1, heads=2, value_heads=4, length=8, key_dim=256, value_dim=256),
    DeltaShape(length=9, key_dim=40, value_dim=24),
    DeltaShape(length=1, key_dim=64, value_dim=40),
]


def check(inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Output, state and all gradients: about as near to the definition as plain PyTorch in chunks is."""
    exact = {name: x.double() for name, x in inputs.items()}
    results = with_state(attnx.gated_delta_rule)(**inputs, **options)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(results.shape, generator=generator).to(inputs["query"])
    actual = forward_backward(with_state(attnx.gated_delta_rule), inputs, grad, **options)
    expected = forward_backward(with_state(reference.gated_delta_rule), exact, grad.double(), **options)
    plain = forward_backward(with_state(plain_gated_delta_rule), inputs, grad, **options)
    for name, x in actual.items():
        assert_close(x, expected[name], plain[name], name=name)
    return actual


@ON_ALL
@pytest.mark.parametrize("with_initial_state", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype: torch.dtype, shape: DeltaShape, with_initial_state: bool, device: torch.device) -> None:
    check(delta_inputs(shape, dtype, device, with_state=with_initial_state), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_carry(dtype: torch.dtype, shape: DeltaShape) -> None:
    """Chunks that the state takes on in part, or not at all."""
    check(delta_inputs(shape, dtype, with_carry=True), dtype)


def test_carry_of_ones_and_zeros() -> None:
    """Ones change no bit, and zeros leave the state that decays take of it alone."""
    inputs = delta_inputs(DeltaShape(length=200), torch.float32)
    shape = 2, 2, 4
    expected = with_state(attnx.gated_delta_rule)(**inputs)
    assert torch.equal(with_state(attnx.gated_delta_rule)(**inputs, carry=torch.ones(shape)), expected)
    _, state = attnx.gated_delta_rule(**inputs, carry=torch.zeros(shape), return_state=True)
    decay = inputs["log_decay"].double().sum(2).exp()[..., None, None]
    torch.testing.assert_close(state.double(), decay * inputs["initial_state"].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(dtype: torch.dtype, instruction_set: str) -> None:
    check(delta_inputs(SHAPES[1], dtype), dtype)
    check(delta_inputs(SHAPES[5]._replace(length=3), dtype), dtype)


@ON_ALL
@pytest.mark.parametrize("length", [5, 150])
@pytest.mark.parametrize("decay", [0.0, 1e-3, 2.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_decays(dtype: torch.dtype, decay: float, length: int, device: torch.device) -> None:
    """From none at all to those that leave nothing of the state."""
    check(delta_inputs(DeltaShape(length=length), dtype, device, decay=decay), dtype)


@ON_ALL
def test_wide_heads(dtype: torch.dtype, device: torch.device) -> None:
    """A state that no block of threads holds as a whole, and several chunks."""
    check(delta_inputs(DeltaShape(1, 1, 2, 90, 256, 256), dtype, device), dtype)


@ON_ALL
@pytest.mark.parametrize("length", [5, 150])
def test_repeats_bit_for_bit(length: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = delta_inputs(DeltaShape(length=length, value_heads=4, value_dim=70), dtype, device)
    results = check(inputs, dtype)
    for name, x in check(inputs, dtype).items():
        assert torch.equal(x, results[name]), name


@pytest.mark.backends("cuda", "emulated")
def test_no_float32_on_cuda(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"^query: expected one of bfloat16, float16 .*, got float32"):
        attnx.gated_delta_rule(**delta_inputs(DeltaShape(length=5), torch.float32, device))


@ON_ALL
@pytest.mark.parametrize("length", [5, 150])
def test_forgets_on_every_backend(length: int, dtype: torch.dtype, device: torch.device) -> None:
    """A log decay of -inf is 0 in the reference, too."""
    inputs = delta_inputs(DeltaShape(length=length), dtype, device)
    inputs["log_decay"][:, :, length // 2] = -torch.inf
    function = with_state(attnx.gated_delta_rule)
    rest = {name: x[:, :, length // 2 :] for name, x in inputs.items() if name != "initial_state"}
    expected = with_state(reference.gated_delta_rule)(**{name: x.double() for name, x in rest.items()})
    plain = with_state(plain_gated_delta_rule)(**rest)
    assert_close(function(**inputs)[:, :, length // 2 :], expected, plain)
    grads = forward_backward(function, inputs, torch.ones_like(function(**inputs)))
    assert not grads["grad_initial_state"].isnan().any()
    assert all(x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize("length", [5, 150])
def test_a_state_is_forgotten(length: int) -> None:
    """A log decay of -inf begins another sequence."""
    inputs, start = delta_inputs(DeltaShape(length=length), torch.float64), length // 2
    inputs["log_decay"][:, :, start] = -torch.inf
    output, state = attnx.gated_delta_rule(**inputs, return_state=True)
    rest = {name: x[:, :, start:] for name, x in inputs.items() if name != "initial_state"}
    expected, expected_state = attnx.gated_delta_rule(**rest, return_state=True)
    torch.testing.assert_close(output[:, :, start:], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-13)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    total = attnx.gated_delta_rule(**leaves)[:, :, start:].sum()
    for name, grad in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert grad.isfinite().all(), name
        if name == "initial_state":
            assert not grad.any()
        else:
            # Gradients of log decays are differences of sums.
            assert grad[:, :, :start].abs().max() < (1e-14 if name == "log_decay" else 1e-300), name


@ON_ALL
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_betas(beta: float, dtype: torch.dtype, device: torch.device) -> None:
    """0 stores nothing, and 2 reflects: with keys of norm 1 the state does not grow."""
    inputs = delta_inputs(DeltaShape(length=150), dtype, device)
    inputs["beta"].fill_(beta)
    check(inputs, dtype)


def test_keys_that_repeat() -> None:
    """What the state holds for a key is replaced, however often it comes."""
    inputs = delta_inputs(DeltaShape(length=150), torch.float32, decay=0.0)
    inputs["key"] = inputs["key"][:, :, :1].expand_as(inputs["key"])
    inputs["query"], inputs["beta"] = inputs["key"], torch.ones_like(inputs["beta"])
    output = attnx.gated_delta_rule(**inputs, scale=1.0)
    torch.testing.assert_close(output, inputs["value"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [False, True], ids=["plain", "normalised, carry"])
def test_gradcheck(more: bool) -> None:
    for shape in (DeltaShape(1, 1, 2, 67, 3, 2), DeltaShape(1, 1, 1, 3, 2, 3)):
        inputs = delta_inputs(shape, torch.float64, with_carry=more)
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}

        def both(*tensors: Tensor, leaves: dict[str, Tensor] = leaves) -> Any:
            inputs = dict(zip(leaves, tensors, strict=True))
            return attnx.gated_delta_rule(**inputs, normalize_qk=more, return_state=True)

        # A central difference of a log decay of 0 would be positive.
        leaves["log_decay"].data.sub_(1e-3)
        assert torch.autograd.gradcheck(both, tuple(leaves.values()), nondet_tol=0.0)


def in_pieces(sizes: list[int], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    state, outputs = inputs["initial_state"], []
    tokens = {name: x.split(sizes, 2) for name, x in inputs.items() if name != "initial_state"}
    for i in range(len(sizes)):
        piece = {name: x[i] for name, x in tokens.items()}
        output, state = attnx.gated_delta_rule(**piece, initial_state=state, return_state=True)
        outputs.append(output)
    return torch.cat(outputs, 2), state


@given(data=st.data())
def test_any_pieces(data: st.DataObject) -> None:
    """A sequence in pieces is the sequence, and so are its gradients."""
    sizes = [*data.draw(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 90)), max_size=5)), 1]
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    shape = DeltaShape(1, 1, 2, sum(sizes), 20, 12)
    inputs = delta_inputs(shape, dtype)

    def pieces(return_state: bool, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        return in_pieces(sizes, inputs)

    grad = torch.randn(1, 2, sum(sizes) + 20, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = forward_backward(with_state(attnx.gated_delta_rule), inputs, grad)
    parts = forward_backward(with_state(pieces), inputs, grad)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(with_state(reference.gated_delta_rule), exact, grad.double())
    for name, x in parts.items():
        assert_close(x, expected[name], whole[name], name=name)


@ON_ALL
def test_decode(device: torch.device) -> None:
    """Token by token after a prompt."""
    inputs = delta_inputs(DeltaShape(length=90), torch.bfloat16, device)
    output, state = in_pieces([64, *[1] * 26], inputs)
    expected, expected_state = attnx.gated_delta_rule(**inputs, return_state=True)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


THREADED = [
    DeltaShape(1, 1, 1, 150, 128, 200),
    DeltaShape(1, 1, 3, 700, 40, 70),
    DeltaShape(1, 2, 2, 300, 64, 33),
    DeltaShape(length=1, value_dim=200),
]


@pytest.mark.parametrize("shape", THREADED, ids=str)
def test_threads_do_not_change_a_bit(shape: DeltaShape, threads: int) -> None:
    """Threads that outnumber the heads share their columns, and the backward's chunks."""
    inputs = delta_inputs(shape, torch.float32, with_carry=True)
    grad = torch.ones(*inputs["value"].shape[:2], shape.length + shape.key_dim, shape.value_dim)
    rule = functools.partial(attnx.gated_delta_rule, normalize_qk=True)
    results = forward_backward(with_state(rule), inputs, grad)
    torch.set_num_threads(1)
    alone = forward_backward(with_state(rule), inputs, grad)
    for name, x in results.items():
        assert torch.equal(x, alone[name]), name


@ON_ALL
@pytest.mark.parametrize("length", [3, 100])
def test_layouts(length: int, dtype: torch.dtype, device: torch.device, poisoned_allocations: None) -> None:
    """Heads within the rows, as projections leave them, and rows with a gap behind them."""
    inputs = delta_inputs(DeltaShape(length=length), dtype, device)
    grad = torch.randn(2, 2, length + 32, 48).to(inputs["query"])
    expected = forward_backward(with_state(attnx.gated_delta_rule), inputs, grad)
    moved = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    wide = {name: x.repeat_interleave(2, 1)[:, ::2] for name, x in inputs.items()}
    for others in (moved, wide):
        assert others["value"].stride() != inputs["value"].stride()
        for name, x in forward_backward(with_state(attnx.gated_delta_rule), others, grad).items():
            assert torch.equal(x, expected[name]), name
    shared = inputs | {name: inputs[name][:1, :1].expand_as(inputs[name]) for name in ("log_decay", "beta")}
    check(shared, dtype)


@ON_ALL
@pytest.mark.parametrize("shape", [DeltaShape(length=0), DeltaShape(batch=0)], ids=str)
def test_nothing_to_do(shape: DeltaShape, dtype: torch.dtype, device: torch.device) -> None:
    inputs = delta_inputs(shape, dtype, device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output, state = attnx.gated_delta_rule(**leaves, return_state=True)
    assert output.shape == inputs["value"].shape
    assert torch.equal(state, inputs["initial_state"])
    (grad,) = torch.autograd.grad(state.sum() + output.sum(), leaves["initial_state"])
    assert torch.equal(grad, torch.ones_like(state))
    del leaves["initial_state"]
    assert not attnx.gated_delta_rule(**leaves, return_state=True)[1].any()


def test_scale() -> None:
    inputs = delta_inputs(DeltaShape(value_heads=4), torch.float64)
    check(inputs, torch.float64, scale=-0.3)
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(module.gated_delta_rule(**inputs, scale=scale).square().sum(), scale)[0]
        for module in (attnx, reference)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [*SHAPES[:2], SHAPES[4], SHAPES[6]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_rows(dtype: torch.dtype, shape: DeltaShape) -> None:
    """Of any length, 0 among them."""
    inputs = delta_inputs(shape, dtype, with_carry=True)
    for name, place in (("query", 0), ("key", -1)):
        inputs[name] = inputs[name] * torch.linspace(0.1, 8, shape.length).to(dtype)[:, None]
        inputs[name][:, :, place] = 0
    check(inputs, dtype, normalize_qk=True)
    inputs |= {name: inputs[name].double() for name in inputs}
    scale = torch.linspace(-1, 2, shape.heads, dtype=torch.float64, requires_grad=True)
    for factor in (scale, scale[0]):
        grads = [
            torch.autograd.grad(with_state(f)(**inputs, scale=factor, normalize_qk=True).square().sum(), scale)[0]
            for f in (attnx.gated_delta_rule, reference.gated_delta_rule)
        ]
        torch.testing.assert_close(*grads)


def test_gradient_of_what_is_asked_for() -> None:
    """Of the state alone, and of some inputs alone."""
    inputs = delta_inputs(DeltaShape(length=100), torch.float32)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    state = attnx.gated_delta_rule(**leaves, return_state=True)[1]
    of_all = torch.autograd.grad(state.sum(), list(leaves.values()))
    for name, expected in zip(leaves, of_all, strict=True):
        one = {other: x.detach() for other, x in inputs.items()} | {name: leaves[name]}
        (grad,) = torch.autograd.grad(attnx.gated_delta_rule(**one, return_state=True)[1].sum(), leaves[name])
        assert torch.equal(grad, expected), name
    assert not of_all[0].any()  # no query is in the state


GOOD = delta_inputs(DeltaShape(2, 2, 4, 5, 8, 3), torch.float32)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": GOOD["query"][0]}, r"query: expected 4 dimensions, .*, got shape \(2, 5, 8\)"),
    "dtype": ({"key": GOOD["key"].double()}, "key: expected float32 like query, got float64"),
    "integers": ({"query": GOOD["query"].int()}, "query: expected one of float32, .*, got int32"),
    "key": ({"key": GOOD["key"][:, :, :4]}, r"key: expected shape \(2, 2, 5, 8\), got \(2, 2, 4, 8\)"),
    "value": ({"value": GOOD["value"][:1]}, r"value: expected shape \(2, 4, 5, 3\), got \(1, 4, 5, 3\)"),
    "heads": ({"value": GOOD["value"][:, :3]}, "value: expected heads to be a multiple of the 2 heads of query, got 3"),
    "layout": ({"key": GOOD["key"].mT.contiguous().mT}, "key: expected a contiguous last dimension"),
    "head_dim": ({"query": torch.zeros(2, 2, 5, 257)}, r"query: expected head_dim from 1 to 256 \(.*\), got 257"),
    "value_dim": ({"value": torch.zeros(2, 4, 5, 0)}, r"value: expected value_dim from 1 to 256 \(.*\), got 0"),
    "gate": ({"beta": GOOD["beta"][..., :4]}, r"beta: expected shape \(2, 4, 5\), got \(2, 4, 4\)"),
    "gate of half": ({"log_decay": GOOD["log_decay"].half()}, "log_decay: expected float32 .*, got float16"),
    "growth": ({"log_decay": GOOD["beta"]}, r"log_decay: expected numbers of 0 or below, .*, got 0.* at \(0, 0, 0\)"),
    "nan": ({"log_decay": GOOD["beta"] * torch.nan}, r"log_decay: expected numbers of 0 or below, .*, got nan"),
    "carry": ({"carry": torch.ones(2, 4, 2)}, r"carry: expected shape \(2, 4, 1\), got \(2, 4, 2\)"),
    "carry of half": ({"carry": torch.ones(2, 4, 1).half()}, "carry: expected float32 .*, got float16"),
    "state": ({"initial_state": torch.zeros(2, 4, 3, 8)}, r"initial_state: expected shape \(2, 4, 8, 3\), got"),
    "state of half": ({"initial_state": torch.zeros(2, 4, 8, 3).bfloat16()}, "initial_state: expected float32 .*, got"),
    "scale": ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    "large scale": ({"scale": 1e39}, "scale: expected a number in the range of float32"),
    "no tensor": ({"beta": 0.5}, "beta: expected a tensor, got 0.5"),
    "no scale": ({"scale": torch.ones(3), "normalize_qk": True}, "scale: expected"),
    "no choice": ({"normalize_qk": None}, "normalize_qk: expected True or False, got None"),
    "no flag": ({"return_state": 1}, "return_state: expected True or False, got 1"),
    "no state": ({"initial_state": [1]}, "initial_state: expected a tensor, got"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        attnx.gated_delta_rule(**GOOD | changes)


def test_the_operator_checks_values() -> None:
    """One growing number anywhere, whatever the strides are."""
    log_decay = GOOD["log_decay"].mT.contiguous().mT.clone(memory_format=torch.preserve_format)
    log_decay[1, 2, 3] = 1e-6
    for operator, more in (
        ("gated_delta_rule", ()),
        ("gated_delta_rule_backward", (GOOD["value"], GOOD["initial_state"])),
    ):
        with pytest.raises(RuntimeError, match=r"^log_decay: expected .* got 1e-06 at \(1, 2, 3\)"):
            getattr(torch.ops.attnx, operator)(*more, *(GOOD | {"log_decay": log_decay}).values(), None, None, False)
    with pytest.raises(RuntimeError, match=r"^grad_state: expected shape \(2, 4, 8, 3\), got \(2, 4, 8, 2\)"):
        torch.ops.attnx.gated_delta_rule_backward(
            GOOD["value"], GOOD["initial_state"][..., :2], *GOOD.values(), None, None, False
        )


def test_autocast() -> None:
    """Rows become half, and gates stay in float32."""
    inputs = delta_inputs(DeltaShape(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = attnx.gated_delta_rule(**inputs, return_state=True)
    rounded = {name: x.bfloat16() if name in ("query", "key", "value") else x for name, x in inputs.items()}
    expected, expected_state = attnx.gated_delta_rule(**rounded, return_state=True)
    assert output.dtype == torch.bfloat16
    assert state.dtype == parameter_dtype(torch.bfloat16)
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)


def test_explain() -> None:
    inputs = delta_inputs(DeltaShape(value_heads=4), torch.bfloat16)
    explanation = attnx.explain(attnx.gated_delta_rule, **inputs)
    assert explanation.supported
    assert "float32, after converting" in str(explanation)
    refused = attnx.explain(attnx.gated_delta_rule, **{name: x.to("meta") for name, x in inputs.items()})
    assert not refused.supported
    assert "missing: backend meta" in str(refused)
