"""Disentangled attention: definition, gradients, buckets, the module and its peer in transformers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx._capability import table
from attnx.nn import DisentangledSelfAttention
from attnx.testing import assert_close
from backends import Backend
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward
from logit_terms import eager

SHAPES = [
    Shape(length_q=65, length_k=65, batch=2, heads=4, kv_heads=2),
    Shape(length_q=40, length_k=130, head_dim=40, value_dim=24, batch=2, heads=3),
    Shape(length_q=300, length_k=7, head_dim=3, heads=2),
    Shape(length_q=1, length_k=200, head_dim=64, heads=4),
]
SPAN = 8


@pytest.fixture(autouse=True)
def _served(backend: Backend) -> None:
    if not any((row.operator, row.backend) == ("disentangled_attention", backend.kernels) for row in table()):
        pytest.skip(f"no kernel on {backend.kernels}")


def draw_positions(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.heads, 2 * SPAN, shape.head_dim, generator=generator).to(device, dtype)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    pos_key: Tensor | None = None,
    pos_query: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Plain PyTorch in the dtype of ``query``: what is gathered from the tables is added as a mask of pairs."""
    groups, length_q, length_k = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    scale = 1 / math.sqrt(query.shape[3] * (1 + (pos_key is not None) + (pos_query is not None)))
    at = index[torch.arange(length_q)[:, None] - torch.arange(length_k) + length_k - 1]
    at = at.expand(*query.shape[:2], -1, -1)
    added = torch.zeros((), dtype=query.dtype)
    if pos_key is not None:
        added = added + (query @ (pos_key * scale).mT).gather(3, at)
    if pos_query is not None:
        added = added + ((key * scale).repeat_interleave(groups, 1) @ pos_query.mT).gather(3, at.mT).mT
    return eager(query, key, value, score="softmax", scale=scale, attn_mask=added, **options)


def check(inputs: dict[str, Tensor], grad_output: Tensor, **options: Any) -> dict[str, Tensor]:
    exact = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    actual = forward_backward(attnx.disentangled_attention, inputs, grad_output, **options)
    expected = forward_backward(reference.disentangled_attention, *exact, **options)
    baseline = forward_backward(plain, inputs, grad_output, **options)
    terms = forward_backward(plain, *exact, **options, constant_sums=True)
    for name, x in actual.items():
        sizes = terms[name] if name.startswith("grad_") else None
        assert_close(x, expected[name], baseline[name], terms=sizes, name=name, dtype=grad_output.dtype)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", ["both", "pos_key", "pos_query"])
def test_definition(given: str, shape: Shape, dtype: torch.dtype, backend: Backend) -> None:
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs |= {
        name: draw_positions(shape, dtype, backend.device, seed)
        for seed, name in enumerate(("pos_key", "pos_query"))
        if given in ("both", name)
    }
    index = attnx.log_distance_buckets(shape.length_q, shape.length_k, span=SPAN, max_distance=64)
    check(inputs, grad_output, index=index)


@pytest.mark.parametrize("heads", [1, 3], ids="{} heads".format)
def test_any_index(heads: int, dtype: torch.dtype, backend: Backend) -> None:
    """Neighbouring keys of a row may have any positions, and some of them the same one again."""
    shape = Shape(length_q=70, length_k=101, heads=heads, batch=2)
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs |= {name: draw_positions(shape, dtype, backend.device) for name in ("pos_key", "pos_query")}
    index = torch.randint(0, 2 * SPAN, (170,), generator=torch.Generator().manual_seed(0))
    check(inputs, grad_output, index=index, window=(60, 70))


def test_threads_and_terms(threads: int, backend: Backend) -> None:
    """A causal window beside shares of keys and dropout, the same bits every time."""
    shape, dtype = Shape(length_q=150, length_k=200, batch=2, heads=4), backend.dtypes()[0]
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    inputs |= {name: draw_positions(shape, dtype, backend.device) for name in ("pos_key", "pos_query")}
    inputs["key_mask"] = (torch.rand(2, 1, 200) * 1.2).clamp(max=1)
    index = attnx.log_distance_buckets(150, 200, span=SPAN, max_distance=64)
    options: dict[str, Any] = {"index": index, "is_causal": True, "window": (90, 0), "softcap": 2.0}
    options |= {"dropout_p": 0.3, "seed": 3, "offset": 1}
    first, second = (check(inputs, grad_output, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.backends("cpu")  # which has float64
def test_gradient(backend: Backend) -> None:
    shape = Shape(length_q=5, length_k=7, head_dim=3, batch=2, heads=2)
    inputs, _ = random_inputs(shape, torch.float64, backend.device)
    positions = [torch.randn(2, 6, 3, dtype=torch.float64) for _ in range(2)]
    leaves = [x.detach().requires_grad_() for x in (*inputs.values(), *positions)]
    index = torch.randint(0, 6, (11,), generator=torch.Generator().manual_seed(0))

    def attention(query: Tensor, key: Tensor, value: Tensor, pos_key: Tensor, pos_query: Tensor) -> Any:
        options = {"pos_key": pos_key, "pos_query": pos_query, "return_logsumexp": True}
        return attnx.disentangled_attention(query, key, value, index, **options)

    assert torch.autograd.gradcheck(attention, leaves)


def test_positions_of_zero_are_softmax_attention(dtype: torch.dtype, backend: Backend) -> None:
    shape = SHAPES[0]
    inputs, grad_output = random_inputs(shape, dtype, backend.device)
    index = attnx.log_distance_buckets(65, 65, span=SPAN)
    zero = {"pos_key": torch.zeros(4, 2 * SPAN, shape.head_dim, dtype=dtype), "index": index, "scale": 0.3}
    actual = forward_backward(attnx.disentangled_attention, inputs, grad_output, **zero)
    expected = forward_backward(attnx.softmax_attention, inputs, grad_output, scale=0.3, key_bias=torch.zeros(1, 1, 65))
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


def test_buckets() -> None:
    """Known values of DebertaV2's buckets: 256 up to 512 tokens."""
    index = attnx.log_distance_buckets(600, 600, span=256, max_distance=512) - 256
    at = {distance: int(index[distance + 599]) for distance in (0, 1, 127, 128, 129, 200, 511, 599, -128, -129, -599)}
    assert {x: at[x] for x in (0, 1, 127, 128, -128)} == {0: 0, 1: 1, 127: 127, 128: 128, -128: -128}
    assert at[511] == 255
    assert at[599] == 255  # clamped into the table
    assert at[-599] == -256
    assert at[-129] == -at[129]
    assert 128 < at[200] < 255
    assert bool((index.diff() >= 0).all())
    every = attnx.log_distance_buckets(600, 600, span=256)
    assert every[[0, 598, 599, 600, 1198]].tolist() == [0, 255, 256, 257, 511]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_key": None, "pos_query": None}, "pos_key: expected a tensor where pos_query is None, got None"),
        ({"pos_key": torch.zeros(3, 16, 16)}, r"pos_key: expected torch.float32 of shape \(4, 16, 16\) like query"),
        ({"pos_query": torch.zeros(4, 15, 16)}, r"pos_query: expected torch.float32 of shape \(4, 16, 16\)"),
        ({"index": torch.zeros(128)}, r"index: expected int64 or int32 of shape \(129,\), length_q \+ length_k - 1"),
        ({"index": torch.full((129,), 16)}, "index: expected numbers from 0 to below 16, the relative positions"),
        ({"scale": torch.ones(())}, "scale: expected a number"),
        ({"dropout_p": 1.0}, "dropout_p: expected a probability"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str, backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPES[0], torch.float32, backend.device)
    positions = {name: torch.zeros(4, 16, 16) for name in ("pos_key", "pos_query")}
    index = attnx.log_distance_buckets(65, 65, span=8)
    with pytest.raises(RuntimeError, match=message):
        attnx.disentangled_attention(**inputs | {"index": index} | positions | change)


@pytest.mark.backends("cpu", "emulated")  # whose host sees the index
def test_bad_index_of_the_operator(backend: Backend) -> None:
    inputs, _ = random_inputs(Shape(length_q=3, length_k=4, heads=2), backend.dtypes()[0], backend.device)
    rows = torch.zeros(1, 2, 3, 5)
    rest = (None, None, None, 0.0, None, None, None, False, -1, -1, 0)
    for number in (-1, 5):
        index = torch.full((6,), number, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="table_index: expected numbers from 0 to below 5"):
            torch.ops.attnx.disentangled_attention(*inputs.values(), rows, None, index, *rest)


UNSEEN = """
import sys

import torch

from cases import Shape, random_inputs

device = torch.device(sys.argv[1])
inputs, grad_output = random_inputs(Shape(length_q=70, length_k=101, heads=2), torch.float16, device)
tables = [torch.randn(1, 2, length, 5).to(device) for length in (70, 101)]


def results(number):
    leaves = [x.detach().requires_grad_() for x in (*inputs.values(), *tables)]
    index = (torch.arange(170, dtype=torch.int32) % 4).to(device)
    index[::3] = number
    rest = (None, None, None, 0.0, None, None, None, False, -1, -1, 0)
    output = torch.ops.attnx.disentangled_attention(*leaves, index, *rest)[0]
    return output, *torch.autograd.grad(output, leaves, grad_output)


expected = results(4)
for number in (5, 2**31 - 1, -1, -(2**31)):
    assert all(torch.equal(x, y) for x, y in zip(results(number), expected, strict=True)), number
"""


@pytest.mark.backends("cuda", "emulated")
def test_an_index_that_the_host_does_not_see(backend: Backend) -> None:
    """A number outside of a table's row counts as the row's last, so that nothing outside is read or written."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "ATTNX_HOST_UNREAD": "1"}
    command = [sys.executable, "-c", UNSEEN, backend.device.type]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def test_explained(backend: Backend) -> None:
    inputs, _ = random_inputs(SHAPES[0], backend.dtypes()[0], backend.device)
    positions = torch.zeros(4, 16, 16, dtype=backend.dtypes()[0])
    index, given = attnx.log_distance_buckets(65, 65, span=8), {"pos_key": positions, "softcap": 2.0}
    explanation = attnx.explain(attnx.disentangled_attention, *inputs.values(), index, **given)
    assert explanation.supported
    assert explanation.kernel is not None
    assert explanation.kernel.startswith("disentangled_attention [")


def module(**options: Any) -> DisentangledSelfAttention:
    torch.manual_seed(0)
    return DisentangledSelfAttention(24, 4, span=8, max_distance=32, **options).double()


@pytest.mark.backends("cpu")  # which has float64
@pytest.mark.parametrize("options", [{}, {"share_projections": True}, {"p2c": False}, {"c2p": False}], ids=str)
def test_module(options: dict[str, Any]) -> None:
    """It is the operator around its projections, and every parameter gets a gradient."""
    attention = module(**options)
    x, positions = torch.randn(2, 20, 24).double(), torch.randn(16, 24).double()
    key_mask = torch.arange(20) < torch.tensor([[20], [13]])
    output = attention(x, positions, key_mask)
    heads = [f(x).view(2, 20, 4, 6).transpose(1, 2) for f in (attention.query_proj, attention.key_proj)]
    heads.append(attention.value_proj(x).view(2, 20, 4, 6).transpose(1, 2))
    shared = options.get("share_projections", False)
    of_positions = {
        "pos_key": attention.key_proj if shared else getattr(attention, "pos_key_proj", None),
        "pos_query": attention.query_proj if shared else getattr(attention, "pos_query_proj", None),
    }
    expected = reference.disentangled_attention(
        *heads,
        attnx.log_distance_buckets(20, 20, span=8, max_distance=32),
        **{k: f(positions).view(16, 4, 6).transpose(0, 1) for k, f in of_positions.items() if f is not None},
        key_mask=key_mask[:, None].double(),
    )
    torch.testing.assert_close(output, expected.transpose(1, 2).flatten(2))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())


def test_bad_module() -> None:
    for options, message in [
        ({"c2p": False, "p2c": False}, "c2p: expected True where p2c is False"),
        ({"dropout": 1.0}, "dropout: expected from 0 to below 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            module(**options)
    with pytest.raises(ValueError, match="positions: expected"):
        module()(torch.zeros(1, 3, 24).double(), torch.zeros(15, 24).double())
    with pytest.raises(ValueError, match="key_mask: expected bool"):
        module()(torch.zeros(1, 3, 24).double(), torch.zeros(16, 24).double(), torch.ones(1, 3))


def test_compiled(backend: Backend) -> None:
    dtype = backend.dtypes()[0]
    inputs, _ = random_inputs(SHAPES[0], dtype, backend.device)
    inputs["pos_key"] = draw_positions(SHAPES[0], dtype, backend.device)
    index = attnx.log_distance_buckets(65, 65, span=8)
    compiled = torch.compile(attnx.disentangled_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(**inputs, index=index), attnx.disentangled_attention(**inputs, index=index))
