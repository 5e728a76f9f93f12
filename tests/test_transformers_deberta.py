"""DebertaV2 of transformers, of random weights, by attnx's attention: what eager transformers computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.20")

from attnx.integrations.transformers import use_disentangled_attention  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "relative_attention": True,
    "position_buckets": 16,
    "max_relative_positions": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "norm_rel_ebd": "layer_norm",
    "initializer_range": 0.2,
}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {"pos_att_type": ["p2c", "c2p"], "share_att_key": True},
    "own_projections": {"pos_att_type": ["p2c", "c2p"]},
    "c2p": {"pos_att_type": ["c2p"]},
    "no_buckets": {"pos_att_type": ["p2c", "c2p"], "position_buckets": -1, "max_relative_positions": 12},
}


def model(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**SMALL | KINDS[kind] | changes)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_eager(kind: str) -> None:
    theirs, ours = model(kind).double(), model(kind).double()
    assert use_disentangled_attention(ours) == 2
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) < torch.tensor([[40], [29]])
    results = []
    for x in (theirs, ours):
        output = x(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in x.parameters())])
    # What moves all logits of a row alike has a gradient of rounding, so that the largest number is the scale. Theirs
    # takes the square root of its scale in float32.
    scale = max(float(expected.abs().max()) for expected in results[0])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9 * scale)


def test_a_training_step_with_dropout() -> None:
    trained = model("v3", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    use_disentangled_attention(trained)
    trained.train()
    ids = torch.randint(1, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    first, second = (trained(ids).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in trained.parameters() if p.grad is not None)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="model: expected one with DebertaV2 layers, got Linear without"):
        use_disentangled_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected relative_attention"):
        use_disentangled_attention(model("v3", relative_attention=False))
    ours = model("v3")
    use_disentangled_attention(ours)
    ids = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        ours(ids, output_attentions=True)
    attention = ours.encoder.layer[0].attention.self
    with pytest.raises(NotImplementedError, match="attention_mask: expected one that tells tokens from padding"):
        attention(torch.zeros(1, 5, 48), torch.ones(1, 1, 5, 5).tril(), rel_embeddings=torch.zeros(32, 48))
