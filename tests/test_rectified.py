"""Rectified sparse attention: which blocks are attended to, how rows are scaled, and what stands for the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import rectified, reference
from attnx.testing import assert_close
from cases import DTYPES, Shape, random_inputs
from compare import forward_backward

LENGTH, TEXT = 700, 70
SHAPE = Shape(LENGTH, LENGTH, 32, 24, batch=2, heads=4, kv_heads=2)
USED = torch.tensor([LENGTH, LENGTH - 40], dtype=torch.int32)
CASES: dict[str, dict[str, Any]] = {
    "no_text": {},
    "text": {"text_length": TEXT},  # the video ends within a block
    "whole_blocks": {"text_length": LENGTH - 5 * 128},
    "padded_text": {"text_length": TEXT, "seqused_k": USED},
    "long_text": {"text_length": 650},
    "least": {"text_length": TEXT, "top_p": 0.0, "drop": 1.0},
    "scale": {"text_length": TEXT, "scale": 0.3},
}


def _inputs(dtype: torch.dtype, device: torch.device, shape: Shape = SHAPE) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks differ from each other more than their tokens, without which no mean stands for them."""
    inputs, grad_output = random_inputs(shape, dtype, device)
    generator = torch.Generator().manual_seed(3)
    for name in ("query", "key"):
        x = inputs[name]
        shift = torch.randn(*x.shape[:2], -(-x.shape[2] // 128), x.shape[3], generator=generator) * 1.5
        shift = shift.repeat_interleave(128, 2)[:, :, : x.shape[2]].to(device)
        inputs[name] = (0.3 * x.double() + shift).to(dtype)
    return inputs, grad_output


def _options(case: str, device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in CASES[case].items()}


def _selected(inputs: dict[str, Tensor], options: dict[str, Any]) -> rectified.Pooled:
    given = {"top_p": 0.3, "drop": 0.8, "neighbours": None, "seqused_k": None, "scale": None} | options
    video = LENGTH - given.pop("text_length", 0)
    return rectified.pool(inputs["query"], inputs["key"], video, **given)


def _plain(query: Tensor, key: Tensor, value: Tensor, *, blocks: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """The definition with the logits as a matrix, in the dtype of query."""
    text = options.get("text_length", 0)
    video, groups = query.shape[2] - text, query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = options.get("scale", query.shape[3] ** -0.5)
    used = options.get("seqused_k", torch.full((len(query),), query.shape[2], device=query.device))
    padding = (torch.arange(query.shape[2], device=query.device) >= used[:, None])[:, None, None]
    mean_q, mean_k, mean_v = (
        torch.stack([y.mean(2) for y in x[:, :, :video].split(128, 2)], 2) for x in (query, key, value)
    )
    of_text = (mean_q @ key[:, :, video:].mT * scale).masked_fill(padding[..., video:], -torch.inf)
    weights = torch.cat((mean_q @ mean_k.mT * scale, of_text), -1).softmax(-1)
    n = mean_k.shape[2]
    sizes = torch.tensor([x.shape[2] for x in key[:, :, :video].split(128, 2)], device=query.device)
    weights = torch.cat((weights[..., :n] * sizes.to(query.dtype), weights[..., n:]), -1)
    critical, gains = blocks
    moved = (weights / weights.sum(-1, keepdim=True))[..., :n].masked_fill(critical | ~gains, 0.0)
    visible = torch.cat(
        (critical.repeat_interleave(128, 3)[..., :video], critical.new_ones(*critical.shape[:3], text)), -1
    )
    visible = torch.cat(
        (visible.repeat_interleave(128, 2)[:, :, :video], visible.new_ones(*visible.shape[:2], text, LENGTH)), 2
    )
    output = (query * scale @ key.mT).masked_fill(padding | ~visible, -torch.inf).softmax(-1) @ value
    gate, addend = 1 - moved.sum(-1, keepdim=True), moved @ mean_v
    gate, addend = (x.repeat_interleave(128, 2)[:, :, :video] for x in (gate, addend))
    return torch.cat((gate * output[:, :, :video] + addend, output[:, :, video:]), 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(case: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = _inputs(dtype, device)
    options = _options(case, device)
    _, *blocks = _selected(inputs, options)
    got = forward_backward(attnx.rectified_attention, inputs, grad_output, **options)
    exact = {name: x.double() for name, x in inputs.items()}
    want = forward_backward(reference.rectified_attention, exact, grad_output.double(), blocks=blocks, **options)
    plain = forward_backward(_plain, inputs, grad_output, blocks=blocks, **options)
    for name, x in got.items():
        assert x.dtype == dtype
        assert_close(x, want[name], plain[name], name=name, dtype=dtype)


@pytest.mark.parametrize("case", CASES)
def test_blocks(case: str, device: torch.device, dtype: torch.dtype) -> None:
    """No product of these inputs is so near to what it is compared with that rounding decides."""
    inputs, _ = _inputs(dtype, device)
    options = _options(case, device)
    shares, critical, gains = _selected(inputs, options)
    want_shares, want_critical, want_gains = reference.rectified_blocks(inputs["query"], inputs["key"], **options)
    columns = shares.shape[-1]
    torch.testing.assert_close(shares.double(), want_shares[..., :columns], rtol=1e-4, atol=1e-6)
    assert torch.equal(critical, want_critical)
    assert torch.equal(gains, want_gains)
    if case != "long_text":
        assert 0 < critical.double().mean() < 1
        assert 0 < (gains & ~critical).double().mean() < 1


def test_nothing_dropped_is_softmax(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(dtype, device)
    for text in (0, TEXT):
        got = attnx.rectified_attention(**inputs, text_length=text, drop=0.0)
        exact = reference.softmax_attention(**inputs)
        assert_close(got, exact, attnx.softmax_attention(**inputs))
    assert torch.equal(attnx.rectified_attention(**inputs, text_length=LENGTH), attnx.softmax_attention(**inputs))


def test_nearer_to_softmax_than_without_rectification(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(dtype, device)
    exact = reference.softmax_attention(**inputs)
    _, critical, _ = _selected(inputs, {})
    alone = attnx.block_sparse_attention(**inputs, block_mask=attnx.BlockMask.from_dense(critical, (128, 128)))
    errors = [(x.double() - exact).norm() for x in (attnx.rectified_attention(**inputs), alone)]
    assert errors[0] < 0.9 * errors[1]


def test_neighbours(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(dtype, device)
    blocks = -(-LENGTH // 128)
    beside = torch.eye(blocks, dtype=torch.bool, device=device)
    _, critical, _ = _selected(inputs, {})
    _, more, _ = _selected(inputs, {"neighbours": beside})
    assert torch.equal(more, critical | beside)
    assert not torch.equal(more, critical)
    every = torch.ones(1, 4, blocks, blocks, dtype=torch.bool, device=device)
    got = attnx.rectified_attention(**inputs, neighbours=every)
    assert_close(got, reference.softmax_attention(**inputs), attnx.softmax_attention(**inputs))


def test_padding_has_no_effect(dtype: torch.dtype, device: torch.device) -> None:
    inputs, grad_output = _inputs(dtype, device)
    options = _options("padded_text", device)
    want = forward_backward(attnx.rectified_attention, inputs, grad_output, **options)
    for name in ("key", "value"):
        inputs[name] = inputs[name].clone()
        inputs[name][1, :, USED[1] :] = 1000.0
    got = forward_backward(attnx.rectified_attention, inputs, grad_output, **options)
    for name, x in got.items():
        assert torch.equal(x, want[name]), name
    for name in ("key", "value"):
        assert not got[f"grad_{name}"][1, :, USED[1] :].any()


def test_layouts_and_learned_scale(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(dtype, device)
    want = attnx.rectified_attention(**inputs, text_length=TEXT)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert torch.equal(attnx.rectified_attention(**strided, text_length=TEXT), want)
    assert torch.equal(attnx.rectified_attention(**{n: x[1] for n, x in inputs.items()}, text_length=TEXT), want[1])
    scale = torch.full((4,), 0.2, device=device, requires_grad=True)
    attnx.rectified_attention(**inputs, text_length=TEXT, scale=scale).float().square().sum().backward()
    assert scale.grad is not None
    assert scale.grad.all()


def test_explain(dtype: torch.dtype, device: torch.device) -> None:
    inputs, _ = _inputs(dtype, device)
    answer = attnx.explain(attnx.rectified_attention, **inputs, text_length=TEXT, seqused_k=USED.to(device))
    assert answer.supported
    assert answer.operator == "rectified_attention"
    assert answer.kernel is not None
    assert answer.kernel.startswith("block_sparse_attention [")
    missing = attnx.explain(attnx.rectified_attention, *(x[..., :1].expand(2, -1, -1, 300) for x in inputs.values()))
    assert not missing.supported


@pytest.mark.backends("cpu")
def test_gradients(backend: object) -> None:
    """The choice of blocks does not change within the differences."""
    inputs, _ = _inputs(torch.float64, torch.device("cpu"), Shape(270, 270, 4, 3, heads=2, kv_heads=1))
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs.values()]

    def along(*steps: Tensor) -> Tensor:
        moved = (x + s * d for x, s, d in zip(inputs.values(), steps, directions, strict=True))
        return attnx.rectified_attention(*moved, text_length=9, drop=1.0)

    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in inputs]
    assert torch.autograd.gradcheck(along, zeros)


@pytest.mark.backends("cpu")
def test_autocast(backend: object) -> None:
    """Attention is in the dtype of autocast, and what is made of pooled rows in float32."""
    inputs, _ = _inputs(torch.float32, torch.device("cpu"))
    half = {name: x.bfloat16() for name, x in inputs.items()}
    options = _options("padded_text", torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        got = attnx.rectified_attention(**inputs, **options)
        shares, *blocks = _selected(inputs, options)
    assert got.dtype == torch.bfloat16
    want_shares, *want_blocks = _selected(half, options)
    torch.testing.assert_close(shares, want_shares, rtol=1e-2, atol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(blocks, want_blocks, strict=True))
    torch.testing.assert_close(got, attnx.rectified_attention(**half, **options), rtol=0.05, atol=0.02)


@pytest.mark.backends("cpu")
def test_compiled(backend: object) -> None:
    inputs, _ = _inputs(torch.float32, torch.device("cpu"))
    compiled = torch.compile(attnx.rectified_attention, fullgraph=True, backend="aot_eager")
    options = _options("padded_text", torch.device("cpu"))
    torch.testing.assert_close(compiled(**inputs, **options), attnx.rectified_attention(**inputs, **options))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query: expected a tensor, got None"),
        ({"query": torch.ones(2, 4)}, "query: expected (batch, heads, length, head_dim), got a tensor of shape (2, 4)"),
        ({"key": torch.ones(2, 2, 690, 32)}, "key: expected the 700 tokens of query, got"),
        ({"key": torch.ones(2, 2, 700, 16)}, "key: expected the head_dim and a divisor of the heads of query"),
        ({"text_length": 701}, "text_length: expected an int from 0 to 700, got 701"),
        ({"top_p": 1.5}, "top_p: expected a share of the weights from 0 to 1, got 1.5"),
        ({"drop": -0.1}, "drop: expected a share of the blocks from 0 to 1, got -0.1"),
        ({"neighbours": torch.ones(6, 6)}, "neighbours: expected bool of shape (6, 6) or (2, 4, 6, 6), got"),
        ({"neighbours": torch.ones(5, 5).bool()}, "neighbours: expected bool of shape (6, 6) or (2, 4, 6, 6), got"),
        ({"seqused_k": torch.tensor([700])}, "seqused_k: expected int32 of shape (2,), got torch.int64 of shape (1,)"),
        (
            {"seqused_k": torch.tensor([700, 600], dtype=torch.int32), "text_length": 20},
            "seqused_k: expected at least the 680 tokens of the video, got 600",
        ),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], message: str, backend: object) -> None:
    inputs, _ = random_inputs(SHAPE, torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        attnx.rectified_attention(**inputs | change)
