"""SigmoidAttention, the module: what it computes, composed by hand, and how it lives with the rest of PyTorch."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnx import reference
from attnx.nn import SigmoidAttention
from attnx.testing import assert_close, eager_sigmoid_attention

EMBED_DIM, HEADS, HEAD_DIM = 24, 4, 6

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal_row_bias": {"is_causal": True, "bias": "row"},
    "float_bias_scale_window": {"bias": -1.5, "scale": 0.3, "window": (2, 1)},
    "grouped": {"num_kv_heads": 2, "linear_bias": True},
    "one_kv_head_wide": {"num_kv_heads": 1, "head_dim": 10},
    "trainable_bias": {"bias": "trainable", "bias_length": 7},
    "alibi": {"alibi": True, "is_causal": True},
    "trainable_alibi": {"alibi": "trainable"},
    "norms": {"qk_norm": True, "output_norm": True},
    "rms_norms": {"qk_norm": True, "output_norm": True, "norm_layer": nn.RMSNorm},
    "everything": {
        "num_kv_heads": 2,
        "head_dim": 8,
        "linear_bias": True,
        "bias": "trainable",
        "bias_length": 5,
        "is_causal": True,
        "window": (4, 0),
        "alibi": "trainable",
        "qk_norm": True,
        "output_norm": True,
        "rotary": lambda query, key: (query.flip(-1), 2 * key),
    },
}


def build(device: torch.device, dtype: torch.dtype, **options: Any) -> SigmoidAttention:
    torch.manual_seed(0)
    return SigmoidAttention(EMBED_DIM, HEADS, device=device, dtype=dtype, **options)


def tokens(length: int, device: torch.device, dtype: torch.dtype, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, EMBED_DIM, generator=generator, dtype=torch.float64).to(device, dtype)


def by_hand(
    attention: Callable[..., Tensor], module: SigmoidAttention, options: dict[str, Any], x: Tensor, context: Tensor
) -> Tensor:
    """The module's definition on its own weights, around another sigmoid attention."""
    head_dim = options.get("head_dim", HEAD_DIM)
    kv_heads = options.get("num_kv_heads", HEADS)

    def heads(linear: nn.Linear, of: Tensor, count: int) -> Tensor:
        return F.linear(of, linear.weight, linear.bias).view(2, of.shape[1], count, head_dim).transpose(1, 2)

    def normalised(features: Tensor, norm: nn.Module) -> Tensor:
        if isinstance(norm, nn.LayerNorm):
            return F.layer_norm(features, features.shape[-1:], norm.weight, norm.bias, norm.eps)
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(features, features.shape[-1:], norm.weight, norm.eps)
        return features

    query, key = heads(module.q_proj, x, HEADS), heads(module.k_proj, context, kv_heads)
    query, key = normalised(query, module.q_norm), normalised(key, module.k_norm)
    if "rotary" in options:
        query, key = options["rotary"](query, key)
    bias = options.get("bias")
    start = partial(torch.tensor, dtype=torch.float64, device=x.device)
    slopes = start([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
    output = attention(
        query,
        key,
        heads(module.v_proj, context, kv_heads),
        bias=start(-math.log(options["bias_length"])) if bias == "trainable" else bias,
        alibi_slopes=slopes if options.get("alibi") else None,
        **{name: options[name] for name in ("scale", "is_causal", "window") if name in options},
    )
    output = normalised(output, module.output_norm).transpose(1, 2).reshape(2, x.shape[1], HEADS * head_dim)
    return F.linear(output, module.out_proj.weight, module.out_proj.bias)


def exact(module: SigmoidAttention, options: dict[str, Any], x: Tensor, context: Tensor) -> Tensor:
    return by_hand(reference.sigmoid_attention, copy.deepcopy(module).double(), options, x.double(), context.double())


@pytest.mark.parametrize("context_length", [None, 9], ids=["self", "cross"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_is_its_parts_composed(
    configuration: str, context_length: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    options = CONFIGURATIONS[configuration]
    module, x = build(device, dtype, **options), tokens(5, device, dtype)
    context = None if context_length is None else tokens(context_length, device, dtype, seed=2)
    output = module(x, context)
    other = x if context is None else context
    baseline = by_hand(eager_sigmoid_attention, module, options, x, other)
    assert_close(output, exact(module, options, x, other), baseline)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("configuration", ["trainable_bias", "trainable_alibi"])
def test_per_head_parameters_learn(configuration: str, dtype: torch.dtype, device: torch.device) -> None:
    module = build(device, dtype, **CONFIGURATIONS[configuration])
    parameter = dict(module.named_parameters())["bias" if "bias" in configuration else "alibi_slopes"]
    assert parameter.shape == (HEADS,)
    assert parameter.dtype == torch.float32
    before = parameter.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(tokens(5, device, dtype)).square().sum().backward()
    optimizer.step()
    assert (parameter != before).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_what_it_adds_to_logits_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    options = CONFIGURATIONS["everything"]
    module, x = build(device, dtype, **options), tokens(5, device, dtype)
    assert module.bias.dtype == module.alibi_slopes.dtype == torch.float32
    assert module(x).dtype == dtype
    assert module.to(dtype)(x).dtype == dtype


@pytest.mark.parametrize("configuration", ["plain", "grouped", "norms", "everything"])
def test_compiles_in_one_graph(configuration: str, dtype: torch.dtype, device: torch.device) -> None:
    torch._dynamo.reset()
    module = build(device, dtype, **CONFIGURATIONS[configuration])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 8):
        x = tokens(length, device, dtype)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("configuration", ["plain", "norms", "everything"])
def test_autocast(configuration: str, device: torch.device) -> None:
    options = CONFIGURATIONS[configuration]
    module, x = build(device, torch.float32, **options), tokens(5, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), exact(module, options, x, x), atol=0.05, rtol=0.05)


def test_activation_checkpointing(dtype: torch.dtype, device: torch.device, deterministic: None) -> None:
    module = build(device, dtype, **CONFIGURATIONS["everything"])
    gradients = []
    for forward in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        x = tokens(5, device, dtype).requires_grad_()
        gradients.append(torch.autograd.grad(forward(x).square().sum(), [x, *module.parameters()]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_state_dict_round_trip(configuration: str, dtype: torch.dtype, device: torch.device) -> None:
    options = CONFIGURATIONS[configuration]
    module, other, x = build(device, dtype, **options), build(device, dtype, **options), tokens(5, device, dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    assert set(module.state_dict()) == {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def test_starts_on_the_meta_device(dtype: torch.dtype, device: torch.device) -> None:
    options = {"bias": "trainable", "bias_length": 7, "alibi": True}
    module = build(torch.device("meta"), dtype, **options).to_empty(device=device)
    module.reset_parameters()
    expected = build(device, dtype, **options)
    assert torch.equal(module.bias, expected.bias)
    assert torch.equal(module.alibi_slopes, expected.alibi_slopes)


def test_rotary_module_is_a_submodule() -> None:
    class Rotary(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            return query, key

    rotary = Rotary()
    assert rotary in list(SigmoidAttention(EMBED_DIM, HEADS, rotary=rotary).modules())


def test_repr_names_what_was_chosen() -> None:
    plain = SigmoidAttention(EMBED_DIM, HEADS).extra_repr()
    assert plain == "embed_dim=24, num_heads=4, head_dim=6"
    module = SigmoidAttention(EMBED_DIM, HEADS, num_kv_heads=2, bias="trainable", bias_length=7, alibi=True)
    assert module.extra_repr() == f"{plain}, num_kv_heads=2, bias='trainable', bias_length=7, alibi=True"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim: expected a positive int, got 0"),
        ({"num_heads": 2.0}, "num_heads: expected a positive int, got 2.0"),
        ({"num_heads": 5}, "num_heads: expected a divisor of embed_dim = 24 where head_dim is not given, got 5"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"head_dim": -1}, "head_dim: expected a positive int, got -1"),
        ({"bias": "column"}, "a float, got 'column'"),
        ({"bias": True}, 'bias: expected None, "row", "trainable" or a float, got True'),
        ({"bias": "trainable"}, "got bias='trainable' and bias_length=None"),
        ({"bias_length": 7}, "got bias=None and bias_length=7"),
        ({"alibi": "fixed"}, "alibi: expected False, True or \"trainable\", got 'fixed'"),
        ({"rotary": 1}, "rotary: expected a callable"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SigmoidAttention(**{"embed_dim": EMBED_DIM, "num_heads": HEADS, **options})


def test_refuses_tokens_that_do_not_fit() -> None:
    module = SigmoidAttention(EMBED_DIM, HEADS)
    with pytest.raises(ValueError, match=r"x: expected \(batch, length, 24\), got .* \(5, 24\)"):
        module(torch.zeros(5, EMBED_DIM))
    with pytest.raises(ValueError, match=r"context: expected .* \(2, 5, 23\)"):
        module(torch.zeros(2, 5, EMBED_DIM), torch.zeros(2, 5, 23))
