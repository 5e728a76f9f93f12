"""Linear attention with a state against its definition on the matrix of weights in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attnx
from attnx import reference
from attnx._operators.linear_state import features
from attnx.testing import assert_close
from cases import Shape, parameter_dtype, random_inputs
from compare import forward_backward

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_ALL = pytest.mark.backends("cpu", "cuda", "emulated")
MAPS = ["taylor", "elu", "relu", "softmax"]
CPU = torch.device("cpu")
SHAPES = [
    Shape(130, 130, head_dim=16, value_dim=64, batch=2, heads=4, kv_heads=2),
    Shape(64, 64, head_dim=7, value_dim=35, heads=3, kv_heads=1),
    Shape(65, 65, head_dim=1, value_dim=1),
    Shape(1, 1, head_dim=16, value_dim=64, batch=2),
    Shape(3, 3, head_dim=40, value_dim=8, heads=4, kv_heads=2),
]


def inputs_of(
    shape: Shape, dtype: torch.dtype, feature_map: str, initial: bool = True, device: torch.device = CPU
) -> dict[str, Tensor]:
    """The state is that of some tokens before, so that weights that may cancel do not."""
    inputs, _ = random_inputs(shape, dtype, device)
    if initial:
        earlier, _ = random_inputs(shape, torch.float64, device, seed=9)
        state = reference.linear_attention(**earlier, feature_map=feature_map, is_causal=False, return_state=True)[1]
        inputs["initial_state"] = state.to(parameter_dtype(dtype))
    return inputs


def plain_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str = "taylor",
    scale: float | None = None,
    is_causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    constant_sums: bool = False,
) -> Any:
    """The matrix of weights in float32 (float64 for float64), summed from the last term to the first.

    With ``constant_sums`` gradients leave the sums of weights out: they show how large the terms are that cancel.
    """
    dtype, group = query.dtype, query.shape[1] // key.shape[1]
    query, key, value = (x.to(parameter_dtype(dtype)) for x in (query, key, value))
    if feature_map == "taylor":
        query = query * (query.shape[3] ** -0.5 if scale is None else scale)
        of_query, of_key = reference._taylor_features(query), reference._taylor_features(key)
    else:
        of_query, of_key = reference._FEATURE_MAPS[feature_map](query), reference._FEATURE_MAPS[feature_map](key)
    numbers = torch.cat((value, torch.ones_like(value[..., :1])), -1)
    weights = of_query.flip(-1) @ of_key.flip(-1).mT.repeat_interleave(group, 1)
    weights = weights.tril() if is_causal else weights
    sums = weights.flip(-1) @ numbers.flip(2).repeat_interleave(group, 1)
    state = of_key.flip(2).mT @ numbers.flip(2)
    if initial_state is not None:
        sums = sums + of_query @ initial_state.repeat_interleave(group, 1)
        state = state + initial_state
    total = sums[..., -1:].detach() if constant_sums else sums[..., -1:]
    output = (sums[..., :-1] / total.where(total != 0, 1.0)).where(total != 0, 0.0).to(dtype)
    return (output, state) if return_state else output


def both(function: Any, **options: Any) -> Any:
    """Output and state, a number of the state as one of the output."""

    def flat(**inputs: Tensor) -> Tensor:
        output, state = function(**inputs, **options, return_state=True)
        return torch.cat((output.flatten(), state.flatten().to(output.dtype)))

    return flat


def check(inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> None:
    functions = [
        both(f, **options) for f in (attnx.linear_attention, reference.linear_attention, plain_linear_attention)
    ]
    exact = {name: x.double() for name, x in inputs.items()}
    size = functions[0](**inputs).numel()
    grad = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(inputs["query"])
    actual = forward_backward(functions[0], inputs, grad)
    expected = forward_backward(functions[1], exact, grad.double())
    plain = forward_backward(functions[2], inputs, grad)
    terms = forward_backward(both(plain_linear_attention, constant_sums=True, **options), exact, grad.double())
    for name, x in actual.items():
        assert_close(x, expected[name], plain[name], terms=terms[name], name=name)


@ON_ALL
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definition(dtype: torch.dtype, feature_map: str, shape: Shape, initial: bool, device: torch.device) -> None:
    check(inputs_of(shape, dtype, feature_map, initial, device), dtype, feature_map=feature_map)


@ON_ALL
@pytest.mark.parametrize(
    ("feature_map", "shape"),
    [
        ("taylor", Shape(40, 40, head_dim=64, value_dim=20)),
        ("elu", Shape(40, 40, head_dim=256, value_dim=256)),
        ("softmax", Shape(300, 300, head_dim=20, value_dim=150, kv_heads=1)),
        ("taylor", Shape(700, 700, head_dim=6, value_dim=5, heads=1)),
    ],
    ids=str,
)
def test_large_states(feature_map: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """States that no block of threads holds as a whole, and sequences in several segments."""
    check(inputs_of(shape, dtype, feature_map, device=device), dtype, feature_map=feature_map)


@ON_ALL
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("lengths", [(130, 130), (70, 150), (150, 70), (1, 90), (280, 300)], ids=str)
def test_without_a_mask(lengths: tuple[int, int], feature_map: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = Shape(*lengths, head_dim=12, value_dim=24, heads=4, kv_heads=2)
    check(inputs_of(shape, dtype, feature_map, device=device), dtype, feature_map=feature_map, is_causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(dtype: torch.dtype, instruction_set: str) -> None:
    check(inputs_of(SHAPES[1], dtype, "taylor"), dtype)


@ON_ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("lengths", [(1, 1), (64, 64), (130, 130), (200, 70), (700, 700)], ids=str)
def test_without_a_state(
    lengths: tuple[int, int], feature_map: str, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Short calls weigh all pairs: that they leave the state away changes rounding alone."""
    if is_causal and lengths[0] != lengths[1]:
        lengths = lengths[0], lengths[0]
    shape = Shape(*lengths, head_dim=16, value_dim=24, heads=4, kv_heads=2)
    inputs = inputs_of(shape, dtype, feature_map, initial=False, device=device)
    options = {"feature_map": feature_map, "is_causal": is_causal}
    expected = reference.linear_attention(**inputs, **options)
    baseline = plain_linear_attention(**inputs, **options)
    assert_close(attnx.linear_attention(**inputs, **options), expected, baseline)


def test_features() -> None:
    x, y = torch.randn(2, 5, 16, dtype=torch.float64)
    assert reference._taylor_features(x).shape[-1] == features("taylor", 16) == 153
    t = (x * y).sum(-1)
    products = (reference._taylor_features(x) * reference._taylor_features(y)).sum(-1)
    torch.testing.assert_close(products, 1 + t + t.square() / 2)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("feature_map", ["taylor", "elu", "softmax"])
def test_gradcheck(feature_map: str, is_causal: bool) -> None:
    shape = Shape(67, 67, head_dim=2, value_dim=2, heads=2, kv_heads=1)
    leaves = {name: x.requires_grad_() for name, x in inputs_of(shape, torch.float64, feature_map).items()}

    def positional(*tensors: Tensor) -> Any:
        inputs = dict(zip(leaves, tensors, strict=True))
        return attnx.linear_attention(**inputs, feature_map=feature_map, is_causal=is_causal, return_state=True)

    assert torch.autograd.gradcheck(positional, tuple(leaves.values()), nondet_tol=0.0)


@given(data=st.data())
def test_any_pieces(data: st.DataObject) -> None:
    """A sequence in pieces is the sequence, and so are its gradients."""
    sizes = [*data.draw(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 90)), max_size=5)), 1]
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    feature_map = data.draw(st.sampled_from(MAPS[:2]))
    inputs = inputs_of(Shape(sum(sizes), sum(sizes), head_dim=5, value_dim=12, kv_heads=1), dtype, feature_map)

    def pieces(initial_state: Tensor, return_state: bool, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        state, outputs = initial_state, []
        for tokens in zip(*(x.split(sizes, 2) for x in inputs.values()), strict=True):
            piece = dict(zip(inputs, tokens, strict=True))
            output, state = attnx.linear_attention(
                **piece, feature_map=feature_map, initial_state=state, return_state=True
            )
            outputs.append(output)
        return torch.cat(outputs, 2), state

    functions = [both(f, feature_map=feature_map) for f in (attnx.linear_attention, reference.linear_attention)]
    grad = torch.randn(functions[0](**inputs).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = forward_backward(functions[0], inputs, grad)
    parts = forward_backward(both(pieces), inputs, grad)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = forward_backward(functions[1], exact, grad.double())
    constant = both(plain_linear_attention, constant_sums=True, feature_map=feature_map)
    terms = forward_backward(constant, exact, grad.double())
    for name, x in parts.items():
        assert_close(x, expected[name], whole[name], terms=terms[name], name=name)


@ON_ALL
@pytest.mark.parametrize("length", [3, 100])
def test_layouts(length: int, dtype: torch.dtype, device: torch.device, poisoned_allocations: None) -> None:
    inputs = inputs_of(Shape(length, length, batch=2, kv_heads=1), dtype, "taylor", device=device)
    moved = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    function = both(attnx.linear_attention)
    grad = torch.randn(function(**inputs).shape).to(inputs["query"])
    expected = forward_backward(function, inputs, grad)
    for name, x in forward_backward(function, moved, grad).items():
        assert torch.equal(x, expected[name]), name


@ON_ALL
@pytest.mark.parametrize("is_causal", [True, False])
def test_repeats_bit_for_bit(is_causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_of(Shape(300, 300, value_dim=80, heads=4, kv_heads=2), dtype, "taylor", device=device)
    function = both(attnx.linear_attention, is_causal=is_causal)
    grad = torch.ones_like(function(**inputs))
    results = forward_backward(function, inputs, grad)
    for name, x in forward_backward(function, inputs, grad).items():
        assert torch.equal(x, results[name]), name


@pytest.mark.backends("cuda", "emulated")
def test_no_float32_on_cuda(device: torch.device) -> None:
    inputs = inputs_of(Shape(5, 5), torch.float32, "taylor", device=device)
    with pytest.raises(RuntimeError, match=r"^query: expected one of bfloat16, float16 .*, got float32"):
        attnx.linear_attention(**inputs)


THREADED = [
    (Shape(300, 300, batch=3, kv_heads=1), {}),
    (Shape(700, 700, head_dim=16, value_dim=64, heads=2, kv_heads=1), {}),
    (Shape(330, 330, head_dim=16, value_dim=30, heads=2, kv_heads=2), {}),
    (Shape(330, 330, head_dim=64, value_dim=30, heads=2, kv_heads=1), {"feature_map": "elu"}),
    (Shape(200, 450, head_dim=16, value_dim=30, heads=2, kv_heads=1), {"is_causal": False}),
    (Shape(1, 450, head_dim=16, value_dim=30, heads=1, kv_heads=1), {"is_causal": False}),
]


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize(("shape", "options"), THREADED, ids=str)
def test_threads_do_not_change_a_bit(
    shape: Shape, options: dict[str, Any], with_state: bool, threads: int, poisoned_allocations: None
) -> None:
    """Threads that outnumber the heads share the rows of states, and the chunks."""
    inputs = inputs_of(shape, torch.float32, options.get("feature_map", "taylor"), initial=with_state)
    function = partial(attnx.linear_attention, **options)
    function = both(function) if with_state else function
    grad = torch.ones(function(**inputs).shape)
    results = forward_backward(function, inputs, grad)
    torch.set_num_threads(1)
    for name, x in forward_backward(function, inputs, grad).items():
        assert torch.equal(x, results[name]), name


@ON_ALL
def test_nothing_to_do(dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_of(Shape(5, 5), dtype, "taylor", device=device)
    none = {name: x[:, :, :0] if name != "initial_state" else x for name, x in inputs.items()}
    output, state = attnx.linear_attention(**none, return_state=True)
    assert output.shape == (1, 2, 0, 16)
    assert torch.equal(state, inputs["initial_state"])
    del inputs["initial_state"]
    no_keys = {name: x if name == "query" else x[:, :, :0] for name, x in inputs.items()}
    assert not attnx.linear_attention(**no_keys, is_causal=False).any()


@ON_ALL
def test_rows_without_weight(dtype: torch.dtype, device: torch.device) -> None:
    """Of relu a row may have none: it gives 0, and no gradient."""
    inputs = inputs_of(Shape(9, 9), dtype, "relu", initial=False, device=device)
    inputs["query"][:, :, 4] = -1
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = attnx.linear_attention(**leaves, feature_map="relu")
    assert not output[:, :, 4].any()
    for grad in torch.autograd.grad(output[:, :, 4].sum(), list(leaves.values())):
        assert not grad.any()


def test_scale() -> None:
    inputs = inputs_of(SHAPES[0], torch.float64, "taylor")
    check(inputs, torch.float64, scale=-0.3)
    scale = torch.tensor([0.5, -2.0, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(module.linear_attention(**inputs, scale=scale).square().sum(), scale)[0]
        for module in (attnx, reference)
    ]
    torch.testing.assert_close(*grads)


GOOD = inputs_of(Shape(5, 5, head_dim=3, value_dim=2, heads=4, kv_heads=2), torch.float32, "taylor")
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"query": GOOD["query"][0]}, r"query: expected 4 dimensions, .*, got shape \(4, 5, 3\)"),
    "dtype": ({"key": GOOD["key"].double()}, "key: expected float32 like query, got float64"),
    "lengths": ({"query": GOOD["query"][:, :, :4]}, "key: expected the length of query, 4, where .* causal, got 5"),
    "map": ({"feature_map": "exp"}, "feature_map: expected taylor, elu, relu or softmax, got exp"),
    "no map": ({"feature_map": None}, "feature_map: expected a string, got None"),
    "state": ({"initial_state": torch.zeros(1, 2, 10, 2)}, r"initial_state: expected shape \(1, 2, 10, 3\), got"),
    "state of a map": ({"feature_map": "elu"}, r"initial_state: expected shape \(1, 2, 3, 3\), got \(1, 2, 10, 3\)"),
    "state of half": (
        {"initial_state": GOOD["initial_state"].half()},
        "initial_state: expected float32 .*, got float16",
    ),
    "scale": ({"scale": float("inf")}, "scale: expected a finite number, got inf"),
    "scale of a map": ({"feature_map": "elu", "scale": 1.0, "initial_state": None}, "scale: expected None with .* elu"),
    "head_dim": (
        {"query": torch.zeros(1, 4, 5, 65), "key": torch.zeros(1, 2, 5, 65)},
        "query: expected head_dim of at most 64 with feature_map taylor, got 65",
    ),
    "no flag": ({"return_state": 1}, "return_state: expected True or False, got 1"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        attnx.linear_attention(**GOOD | changes)


@ON_ALL
def test_decode(device: torch.device) -> None:
    """Token by token after a prompt, in half."""
    inputs = inputs_of(Shape(90, 90, kv_heads=1), torch.bfloat16, "taylor", initial=False, device=device)
    expected, expected_state = attnx.linear_attention(**inputs, return_state=True)
    prompt = {name: x[:, :, :64] for name, x in inputs.items()}
    _, state = attnx.linear_attention(**prompt, return_state=True)
    for token in range(64, 90):
        one = {name: x[:, :, token : token + 1] for name, x in inputs.items()}
        output, state = attnx.linear_attention(**one, initial_state=state, return_state=True)
        torch.testing.assert_close(output, expected[:, :, token : token + 1], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-4)


def test_compiled() -> None:
    inputs = inputs_of(SHAPES[0], torch.float32, "taylor")
    compiled = torch.compile(attnx.linear_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), attnx.linear_attention(**inputs))
