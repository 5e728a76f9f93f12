"""SparseLinearAttention, the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import attnx
from attnx.nn import SigmoidAttention, SparseLinearAttention

EMBED_DIM, HEADS, LENGTH = 24, 4, 200


# What a module adds to its operators does not depend on the device.
pytestmark = pytest.mark.backends("cpu", "emulated")


@pytest.fixture(autouse=True)
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules and tokens are made in a dtype that the backend has."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """They are the same but for the rounding of a few steps."""
    eps, largest = torch.finfo(expected.dtype).eps, expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * eps * max(largest, 1e-2))


def build(**options: Any) -> SparseLinearAttention:
    torch.manual_seed(0)
    return SparseLinearAttention(EMBED_DIM, HEADS, critical=0.3, **options)


def tokens() -> torch.Tensor:
    return torch.randn(2, LENGTH, EMBED_DIM)


@pytest.mark.parametrize("mix", ["projection", "sla2"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_composed_by_hand(is_causal: bool, mix: str) -> None:
    module = build(mix=mix, is_causal=is_causal, num_kv_heads=2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    x = tokens()
    query = module.q_proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    key, value = (p(x).unflatten(2, (2, -1)).transpose(1, 2) for p in (module.k_proj, module.v_proj))
    sparse, linear = attnx.sparse_linear_attention(query, key, value, critical=0.3, is_causal=is_causal)
    if mix == "projection":
        output = sparse + linear @ module.linear_proj.weight.T + module.linear_proj.bias
    else:
        alpha = module.mix_logit.sigmoid()[:, None, None]
        output = alpha * sparse + (1 - alpha) * linear
    assert_close(module(x), module.out_proj(output.transpose(1, 2).flatten(2)))


def test_starts_as_the_critical_blocks_alone_and_learns() -> None:
    module, x = build(), tokens()
    mask = attnx.sparse_linear_block_map(
        module.q_proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2),
        module.k_proj(x).unflatten(2, (HEADS, -1)).transpose(1, 2),
        critical=0.3,
    ).critical_mask()
    query, key, value = (
        p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    sparse = attnx.block_sparse_attention(query, key, value, mask)
    output = module(x)
    assert_close(output, module.out_proj(sparse.transpose(1, 2).flatten(2)))
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_from_multihead_attention() -> None:
    torch.manual_seed(0)
    trained = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True)
    nn.init.normal_(trained.in_proj_bias)
    nn.init.normal_(trained.out_proj.bias)
    module = SparseLinearAttention.from_softmax(trained, critical=1.0, negligible=0.0)
    x = tokens()
    assert_close(module(x), trained(x, x, x, need_weights=False)[0])


def test_from_a_module_of_attnx() -> None:
    torch.manual_seed(0)
    trained = SigmoidAttention(EMBED_DIM, HEADS, num_kv_heads=2, qk_norm=True, linear_bias=True)
    module = SparseLinearAttention.from_softmax(trained, is_causal=True)
    shared = {name: x for name, x in trained.state_dict().items() if name in module.state_dict()}
    assert {"q_proj.bias", "q_norm.weight", "out_proj.weight"} <= shared.keys()
    for name, x in shared.items():
        assert torch.equal(x, module.state_dict()[name])
        assert x.data_ptr() != module.state_dict()[name].data_ptr()


def test_compiles_and_saves() -> None:
    module, x = build(is_causal=True), tokens()
    assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))
    other = build(is_causal=True)
    other.load_state_dict(module.state_dict())
    assert "critical=0.3" in repr(other)
    assert module.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r'^mix: expected "projection" or "sla2", got'):
        build(mix="sum")
    with pytest.raises(ValueError, match=r"^attention: expected torch.nn.MultiheadAttention or a module of attnx.nn"):
        SparseLinearAttention.from_softmax(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^attention: expected add_bias_kv=False"):
        SparseLinearAttention.from_softmax(nn.MultiheadAttention(8, 2, add_bias_kv=True))


def test_rounding_of_the_critical_share() -> None:
    """Of three blocks 0.5 are one, rounded down, and two, rounded up."""
    torch.manual_seed(0)
    x = torch.randn(1, 192, 16)
    modules = {r: attnx.nn.SparseLinearAttention(16, 2, critical=0.5, rounding=r) for r in ("ceil", "floor")}
    modules["floor"].load_state_dict(modules["ceil"].state_dict())
    query, key, value = modules["ceil"].project(x, None)
    for rounding, module in modules.items():
        sparse, _ = attnx.sparse_linear_attention(query, key, value, critical=0.5, rounding=rounding)
        torch.testing.assert_close(module(x), module.merge(sparse))
    assert not torch.equal(modules["ceil"](x), modules["floor"](x))
    assert "rounding='floor'" in repr(modules["floor"])
