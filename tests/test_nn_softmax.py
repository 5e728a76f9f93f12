"""Modules take masks as ``torch.nn.MultiheadAttention`` does, and are made from one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnx
from attnx.nn import (
    AffineScaledAttention,
    DisentangledSelfAttention,
    ProbabilisticAttention,
    RoutingAttention,
    SigmoidAttention,
    SoftplusAttention,
    SparseLinearAttention,
)

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

EMBED_DIM, HEADS, LENGTH = 24, 4, 7

# With these options each covers all keys, so that it is softmax attention.
SOFTMAX: dict[Any, dict[str, Any]] = {
    AffineScaledAttention: {},
    ProbabilisticAttention: {},
    RoutingAttention: {"num_clusters": 1, "num_local_heads": 0, "cluster_size": LENGTH, "shared_qk": False},
    SparseLinearAttention: {"critical": 1.0, "negligible": 0.0},
}
WITHOUT_MASKS = SOFTMAX
EVERY: dict[Any, dict[str, Any]] = SOFTMAX | {
    SigmoidAttention: {},
    SoftplusAttention: {},
    DisentangledSelfAttention: {"span": 4},
}


def names(module: Any) -> str:
    return str(getattr(module, "__name__", module))


def multihead(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    trained = nn.MultiheadAttention(EMBED_DIM, HEADS, batch_first=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in trained.parameters():  # its biases start at 0
            parameter.uniform_(-0.5, 0.5)
    return trained.eval()


def tokens(features: int = EMBED_DIM, length: int = LENGTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, features, dtype=torch.float64, generator=generator)


def later() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("module", SOFTMAX, ids=names)
def test_equals_multihead_attention_that_it_is_made_from(module: Any, bias: bool, is_causal: bool) -> None:
    trained, x = multihead(bias=bias), tokens()
    made = module.from_softmax(trained, **SOFTMAX[module])
    assert not made.training
    expected, _ = trained(x, x, x, attn_mask=later() if is_causal else None, is_causal=is_causal)
    close(made(x, is_causal=is_causal), expected)


@pytest.mark.parametrize("kdim", [EMBED_DIM, 10])
@pytest.mark.parametrize("module", [AffineScaledAttention, ProbabilisticAttention, SparseLinearAttention], ids=names)
def test_equals_multihead_attention_over_a_context(module: Any, kdim: int) -> None:
    trained, x, context = multihead(kdim=kdim, vdim=kdim), tokens(), tokens(kdim, LENGTH + 2, seed=2)
    made = module.from_softmax(trained, **SOFTMAX[module])
    close(made(x, context), trained(x, context, context)[0])
    again = module.from_softmax(made, **SOFTMAX[module])
    assert again.k_proj.weight.shape == (EMBED_DIM, kdim)


def test_batch_first_makes_no_difference() -> None:
    trained, x = multihead(), tokens()
    trained.batch_first = False
    made = ProbabilisticAttention.from_softmax(trained)
    close(made(x), trained(*(x.transpose(0, 1),) * 3)[0].transpose(0, 1))


MASKS: dict[str, Callable[[], dict[str, Tensor | bool]]] = {
    "pairs": lambda: {"attn_mask": later()},
    "pairs_of_heads": lambda: {"attn_mask": later().expand(2 * HEADS, -1, -1).clone().tril_(2)},
    "added": lambda: {"attn_mask": torch.randn(LENGTH, LENGTH, dtype=torch.float64)},
    "padding": lambda: {"key_padding_mask": torch.arange(LENGTH) >= torch.tensor([[5], [7]])},
    "padding_added": lambda: {"key_padding_mask": torch.randn(2, LENGTH, dtype=torch.float64)},
    "both": lambda: {"attn_mask": later(), "key_padding_mask": torch.arange(LENGTH) >= torch.tensor([[5], [7]])},
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_sigmoid_attention(name: str) -> None:
    given = MASKS[name]()
    module = SigmoidAttention.from_softmax(multihead(), bias=-1.5)
    x = tokens()
    query, key, value = module.project(x, None)
    logits = query @ key.mT / query.shape[-1] ** 0.5 - 1.5
    for mask, shape in (("attn_mask", (-1, HEADS, LENGTH, LENGTH)), ("key_padding_mask", (2, 1, 1, LENGTH))):
        if (given_mask := given.get(mask)) is None:
            continue
        assert isinstance(given_mask, Tensor)
        given_mask = given_mask if given_mask.dim() == 2 and mask == "attn_mask" else given_mask.view(shape)
        if given_mask.dtype == torch.bool:
            logits = logits.masked_fill(given_mask, float("-inf"))
        else:
            logits = logits + given_mask
    close(module(x, **given), module.merge(logits.sigmoid() @ value))


@pytest.mark.parametrize("options", [{}, {"c2p": False}, {"p2c": False}], ids=str)
@pytest.mark.parametrize("name", [None, "padding", "padding_added"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_disentangled_attention_equals_multihead_attention(
    options: dict[str, Any], name: str | None, is_causal: bool
) -> None:
    given = MASKS[name]() if name else {}
    trained, x = multihead(), tokens()
    module = DisentangledSelfAttention.from_softmax(trained, span=4, **options)
    positions = torch.randn(8, EMBED_DIM, dtype=torch.float64)
    causal = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(later(), float("-inf"))
    padding = given.get("key_padding_mask")
    if isinstance(padding, Tensor) and padding.dtype == torch.bool:
        padding = torch.zeros(padding.shape, dtype=torch.float64).masked_fill(padding, float("-inf"))
    expected, _ = trained(x, x, x, attn_mask=causal if is_causal else None, key_padding_mask=padding)
    close(trained.out_proj(module(x, positions, is_causal=is_causal, **given)), expected)


@pytest.mark.parametrize("module", EVERY, ids=names)
def test_parameters_get_gradients_after_from_softmax(module: Any) -> None:
    made = module.from_softmax(multihead(), **EVERY[module])
    given = (torch.randn(8, EMBED_DIM, dtype=torch.float64),) if module is DisentangledSelfAttention else ()
    made(tokens(), *given, is_causal=True).square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in made.parameters())


def test_compiles_with_masks() -> None:
    module, x, given = SigmoidAttention.from_softmax(multihead()), tokens(), MASKS["both"]()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(x, **given), module(x, **given))


def refused(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected .*, got "):
        call()


@pytest.mark.parametrize("module", WITHOUT_MASKS, ids=names)
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
def test_a_mask_that_an_attention_lacks_is_refused(module: Any, name: str) -> None:
    made = module.from_softmax(multihead(), **EVERY[module])
    with pytest.raises(ValueError, match=rf"^{name}: expected None, .*{module.__name__}.*; use attnx\."):
        made(tokens(), **{name: torch.zeros(2, LENGTH, dtype=torch.bool)})


def test_bad_input() -> None:
    x, module = tokens(), SigmoidAttention.from_softmax(multihead())
    refused("attn_mask", lambda: module(x, attn_mask=torch.zeros(3, LENGTH, LENGTH)))
    refused("attn_mask", lambda: module(x, attn_mask=torch.zeros(LENGTH, 1)))
    refused("attn_mask", lambda: module(x, attn_mask=torch.zeros(LENGTH, LENGTH, dtype=torch.int64)))
    refused("attn_mask", lambda: module(x, attn_mask=True))
    refused("key_padding_mask", lambda: module(x, key_padding_mask=torch.zeros(1, LENGTH)))
    refused("key_padding_mask", lambda: module(x, key_padding_mask=torch.zeros(2, LENGTH, dtype=torch.uint8)))
    refused("is_causal", lambda: module(x, is_causal=None))
    refused("context", lambda: module(x, tokens(3)))
    refused("context_dim", lambda: SigmoidAttention(8, 2, context_dim=0))
    deberta = DisentangledSelfAttention.from_softmax(multihead(), span=4)
    positions, full = torch.zeros(8, EMBED_DIM, dtype=torch.float64), torch.ones(2, LENGTH, dtype=torch.bool)
    refused("attn_mask", lambda: deberta(x, positions, attn_mask=full))
    refused("is_causal", lambda: deberta(x, positions, is_causal=None))
    refused("key_mask", lambda: deberta(x, positions, full, key_padding_mask=full))


@pytest.mark.parametrize("module", EVERY, ids=names)
def test_what_it_cannot_be_made_from(module: Any) -> None:
    for options, said in (
        ({"add_bias_kv": True}, "add_bias_kv=False"),
        ({"add_zero_attn": True}, "add_zero_attn=False"),
        ({"kdim": 10, "vdim": 12}, "kdim"),
    ):
        with pytest.raises(ValueError, match=f"^attention: expected .*{said}.*, got .*"):
            module.from_softmax(multihead(**options), **EVERY[module])
    refused("attention", lambda: module.from_softmax(nn.Linear(2, 2), **EVERY[module]))


def test_disentangled_attention_takes_dropout_over() -> None:
    assert DisentangledSelfAttention.from_softmax(multihead(dropout=0.25)).dropout == 0.25


def test_a_share_of_the_heads_of_disentangled_attention() -> None:
    whole = DisentangledSelfAttention.from_softmax(multihead(), span=4)
    share = DisentangledSelfAttention.from_softmax(multihead(), span=4)
    half = EMBED_DIM // 2
    for linear in share.children():
        if isinstance(linear, nn.Linear):  # as column-wise tensor parallelism leaves it
            linear.weight, linear.bias = nn.Parameter(linear.weight[:half]), nn.Parameter(linear.bias[:half])
    x, positions = tokens(), torch.randn(8, EMBED_DIM, dtype=torch.float64)
    close(share(x, positions), whole(x, positions)[..., :half])


def test_masks_of_functions_mean_the_opposite() -> None:
    x = torch.randn(1, 2, LENGTH, 4, dtype=torch.float64)
    close(attnx.softmax_attention(x, x, x, attn_mask=~later()), attnx.softmax_attention(x, x, x, is_causal=True))
