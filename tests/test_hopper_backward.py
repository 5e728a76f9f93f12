"""The backward mainloop for Hopper, sm_90a: every path of it against float64, and modules that train on it.

On a GPU of compute capability 9.0, or on the emulator under CUDAEMU_CC=90.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnx
from attnx.nn import SigmoidAttention
from attnx.nn.projections import ProjectedAttention
from cases import DTYPES, MASKS, OPERATORS, VARLEN_OPERATORS, Shape, pack, random_inputs, random_parameter
from compare import check, forward_backward

pytestmark = [pytest.mark.backends("cuda", "emulated"), pytest.mark.needs("sm90"), pytest.mark.usefixtures("backend")]

# Those that have tiles of their own, some that are padded, and some whose values are narrower.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (96, 96), (128, 40), (192, 160)]
LENGTH = 150  # of what modules train on


@pytest.fixture
def sm90() -> Iterator[None]:
    """Calls that another mainloop would serve are errors."""
    with attnx.cuda_mainloop("sm90"):
        yield


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("mask", ["full", "causal", "window_both", "window_right", "window_diagonal"])
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_masks(
    operator: str, dtype: torch.dtype, head_dim: int, value_dim: int, mask: str, device: torch.device
) -> None:
    """Several tiles of rows and of keys, the last ones ragged."""
    check(operator, *random_inputs(Shape(200, 300, head_dim, value_dim, heads=2), dtype, device), **MASKS[mask])


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [2, 3, 4, 16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_groups_and_parameters(
    operator: str, group: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Query heads in one tile where they divide its rows, and in tiles of their own where they do not."""
    shape = Shape(70, 150, head_dim, batch=2, heads=2 * group, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    inputs["alibi_slopes"] = random_parameter((shape.heads,), dtype, device)
    if operator == "sigmoid_attention":
        inputs["bias"] = random_parameter((shape.heads,), dtype, device) - 4
    check(operator, inputs, grad_output, is_causal=True)


@pytest.mark.usefixtures("sm90")
def test_bias_by_row(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = random_inputs(Shape(150, 150, 64, heads=4, kv_heads=2), dtype, device)
    check("sigmoid_attention", inputs, grad_output, bias="row", is_causal=True)


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("operator", VARLEN_OPERATORS)
def test_neighbouring_sequences(operator: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tiles read on into the next sequence, whose numbers may be none: they leave no trace."""
    lengths = ([70, 70, 0, 130], [90, 33, 5, 200])
    inputs, grad_output, sizes = pack(lengths, dtype, device, kv_heads=1, head_dim=head_dim, value_dim=head_dim)
    clean = check(operator, inputs, grad_output, is_causal=True, **sizes)
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name, x in poisoned.items():
        x[lengths[name != "query"][0] :] = torch.nan
    grad_output = grad_output.clone()
    grad_output[lengths[0][0] :] = torch.nan
    results = forward_backward(getattr(attnx, operator), poisoned, grad_output, is_causal=True, **sizes)
    for name, x in results.items():
        own = lengths[name not in ("output", "grad_query")][0]
        tolerance = 4 * torch.finfo(dtype).eps * clean[name][:own].abs().max().item()  # atomics in another order
        torch.testing.assert_close(x[:own], clean[name][:own], rtol=0, atol=tolerance, msg=name)


@pytest.mark.usefixtures("sm90", "deterministic")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "window_causal"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_repeats_bitwise(operator: str, mask: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Also the gradients of bias and slopes, to which three tiles of keys and more add."""
    inputs, grad_output = random_inputs(Shape(260, 300, head_dim, batch=2, heads=2, kv_heads=1), dtype, device)
    inputs["alibi_slopes"] = random_parameter((2,), dtype, device)
    if operator == "sigmoid_attention":
        inputs["bias"] = random_parameter((2,), dtype, device) - 4
    attention = getattr(attnx, operator)
    first = check(operator, inputs, grad_output, **MASKS[mask])
    for _ in range(3):
        again = forward_backward(attention, inputs, grad_output, **MASKS[mask])
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.usefixtures("sm90", "deterministic")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("operator", OPERATORS)
def test_sums_of_many_tiles_repeat_bitwise(
    operator: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """A tile or two of rows, to whose sums many tiles of keys add at about the same time."""
    inputs, grad_output = random_inputs(Shape(66, 64 * 45, head_dim, heads=4), dtype, device)
    inputs["alibi_slopes"] = random_parameter((4,), dtype, device)
    if operator == "sigmoid_attention":
        inputs["bias"] = random_parameter((4,), dtype, device) - 4
    attention = getattr(attnx, operator)
    first = forward_backward(attention, inputs, grad_output)
    for _ in range(5):
        again = forward_backward(attention, inputs, grad_output)
        assert all(torch.equal(again[name], x) for name, x in first.items())


@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_it_does_not_serve(operator: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows that are not on 16 bytes: an error where sm90 is asked for, and served by sm80 where nothing is."""
    inputs, grad_output = random_inputs(Shape(100, 100, 60), dtype, device)
    with pytest.raises(RuntimeError, match=r"query does not start, or has strides .* on multiples of 16 bytes"):
        forward_backward(getattr(attnx, operator), inputs, grad_output)
    with attnx.cuda_mainloop("auto"):
        check(operator, inputs, grad_output)


class SoftmaxAttention(ProjectedAttention):
    is_causal = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        return attnx.softmax_attention(query, key, value, is_causal=is_causal, window=(100, -1))


class BlockSparseAttention(ProjectedAttention):
    is_causal = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        visited = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool().expand(1, self.num_heads, 3, 3)
        mask = attnx.BlockMask.from_dense(visited, (64, 64))
        return attnx.block_sparse_attention(query, key, value, mask, is_causal=is_causal)


# Of the modules of attnx.nn those whose operator has CUDA kernels, and modules around the other such operators.
MODULES: dict[str, Callable[..., nn.Module]] = {
    "sigmoid": partial(SigmoidAttention, num_kv_heads=1, is_causal=True, bias="trainable", bias_length=LENGTH),
    "sigmoid_alibi": partial(SigmoidAttention, alibi="trainable", bias="row", is_causal=True, qk_norm=True),
    "softmax": partial(SoftmaxAttention, num_kv_heads=1),
    "block_sparse": BlockSparseAttention,
}


def train(name: str, head_dim: int) -> list[float]:
    """The losses of a few steps of a module that learns to shift its input, in bfloat16."""
    torch.manual_seed(0)
    attention = MODULES[name](2 * head_dim, 2).to(torch.bfloat16)
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.5)
    x = torch.randn(2, LENGTH, 2 * head_dim).to(torch.bfloat16)
    losses = []
    for _ in range(4):
        loss = (attention(x) - x.roll(1, 1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.backends("emulated")
@pytest.mark.usefixtures("sm90")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", MODULES)
def test_training_goes_as_on_the_cpu(name: str, head_dim: int) -> None:
    losses = train(name, head_dim)
    code = f"import json, test_hopper_backward as t; print(json.dumps(t.train({name!r}, {head_dim})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ATTNX_CUDA_ON_HOST": "0"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    on_cpu = json.loads(done.stdout)
    assert losses == pytest.approx(on_cpu, rel=2**-8)
    assert losses[-1] < losses[0]
