"""Qwen3-Next of transformers, of random weights: its layer as a module of attnx, and its models on attnx's rule."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20")

from attnx.integrations.transformers import use_gated_delta_rule  # noqa: E402
from attnx.nn import GatedDeltaNet  # noqa: E402
from attnx.testing import assert_close  # noqa: E402

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "initializer_range": 0.2,
}
NAMES = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


@pytest.fixture
def modeling() -> Iterator[Any]:
    """The Python module of Qwen3-Next, whose functions are put back."""
    import transformers.models.qwen3_next.modeling_qwen3_next as module

    before = {name: getattr(module, name) for name in NAMES}
    yield module
    for name, function in before.items():
        setattr(module, name, function)


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    made = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SMALL))
    return made.to(dtype).eval()


def their_layer(dtype: torch.dtype = torch.float32) -> Any:
    layer = model(dtype).model.layers[0].linear_attn
    with torch.no_grad():
        layer.dt_bias.uniform_(-2, 0)
        layer.norm.weight.uniform_(0.5, 1.5)
    return layer


@pytest.mark.parametrize("length", [1, 7, 150])
def test_layer(length: int, modeling: Any) -> None:
    """The same outputs and gradients. transformers' rule is in float32, whatever the dtype of the layer is."""
    theirs = their_layer()
    ours = GatedDeltaNet.from_transformers(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, length, 32)
    results = []
    for layer, dtype in ((ours, x.dtype), (copy.deepcopy(ours).double(), torch.float64), (theirs, x.dtype)):
        output = layer(x.to(dtype))
        grads = torch.autograd.grad(output.sin().sum(), [p for _, p in sorted(layer.named_parameters())])
        results.append((output, *grads))
    for actual, expected, of_theirs in zip(*results, strict=True):
        assert_close(actual, expected, of_theirs)


def test_layer_in_bfloat16(modeling: Any) -> None:
    theirs = their_layer(torch.bfloat16)
    ours, x = GatedDeltaNet.from_transformers(theirs), torch.randn(2, 90, 32, dtype=torch.bfloat16)
    exact = GatedDeltaNet.from_transformers(copy.deepcopy(theirs).double())(x.double())
    errors = [(layer(x).double() - exact).abs().max() for layer in (ours, theirs)]
    assert errors[0] <= 2 * errors[1]


def test_layer_decodes_as_theirs(modeling: Any) -> None:
    theirs = their_layer()
    ours, x = GatedDeltaNet.from_transformers(theirs), torch.randn(2, 30, 32)
    cache = transformers.DynamicCache(config=transformers.Qwen3NextConfig(**SMALL))
    with torch.no_grad():
        expected = theirs(x[:, :25], cache=cache)
        output, state = ours.prefill(x[:, :25])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        for token in x[:, 25:].unbind(1):
            output, state = ours.step(token, state)
            torch.testing.assert_close(output, theirs(token[:, None], cache=cache)[:, 0], rtol=1e-4, atol=1e-4)


def test_model(modeling: Any) -> None:
    """Logits, gradients and what it generates are those of transformers' own functions."""
    qwen = model()
    ids = torch.randint(1, 61, (2, 90), generator=torch.Generator().manual_seed(0))

    def run() -> tuple[Any, ...]:
        qwen.zero_grad()
        logits = qwen(ids).logits
        logits.square().mean().backward()
        layer = qwen.model.layers[0].linear_attn
        grads = [layer.in_proj_qkvz.weight.grad.clone(), layer.A_log.grad.clone(), layer.in_proj_ba.weight.grad.clone()]
        generated = qwen.generate(ids, max_new_tokens=8, do_sample=False)
        return logits.detach(), *grads, generated

    expected = run()
    assert use_gated_delta_rule(qwen) == 3
    calls = []
    rule = sys.modules["attnx.integrations.transformers.delta_rule"]
    original = rule.gated_delta_rule
    rule.gated_delta_rule = lambda *x, **options: calls.append(x[0].shape[2]) or original(*x, **options)  # type: ignore[attr-defined]
    try:
        actual = run()
    finally:
        rule.gated_delta_rule = original  # type: ignore[attr-defined]
    assert set(calls) == {90, 1}
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3 * float(y.abs().max()))


def test_it_is_replaced_once(modeling: Any) -> None:
    before = getattr(modeling, NAMES[0])
    for _ in range(2):
        use_gated_delta_rule(model())
    assert getattr(modeling, NAMES[0]).in_place_of is before
    with pytest.raises(ValueError, match="packed sequences"):  # what transformers says of them without another package
        getattr(modeling, NAMES[0])(*torch.zeros(3, 1, 4, 2, 8), *torch.zeros(2, 1, 4, 2), cu_seqlens=torch.tensor([0]))
    with pytest.raises(
        ValueError, match=r"^model: expected one with layers of the gated delta rule, got Linear without"
    ):
        use_gated_delta_rule(torch.nn.Linear(2, 2))


def test_other_models() -> None:
    """Qwen3.5 has other projections around the same functions."""
    import transformers.models.qwen3_5.modeling_qwen3_5 as theirs

    before = {name: getattr(theirs, name) for name in NAMES}
    config = {name: x for name, x in SMALL.items() if "expert" not in name and "moe" not in name}
    torch.manual_seed(0)
    qwen = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**config, intermediate_size=32)).eval()
    ids = torch.randint(1, 61, (2, 90), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            expected = qwen(ids).logits
            assert use_gated_delta_rule(qwen) == 3
            assert hasattr(theirs.torch_chunk_gated_delta_rule, "in_place_of")
            torch.testing.assert_close(qwen(ids).logits, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    finally:
        for name, function in before.items():
            setattr(theirs, name, function)
