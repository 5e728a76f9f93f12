"""DeBERTa's attention in transformers, which has no attention interface there: its modules are replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnx.nn import DisentangledSelfAttention

__all__ = ["use_disentangled_attention"]


class _SelfAttention(DisentangledSelfAttention):
    """It is called as transformers' module of DebertaV2 is."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        if output_attentions:
            raise NotImplementedError("output_attentions: expected False, as attnx keeps no weights, got True")
        if rel_embeddings is None:
            raise ValueError("rel_embeddings: expected a tensor, got None")
        queries = hidden_states if query_states is None else query_states
        return self.attend(queries, hidden_states, rel_embeddings, _key_mask(attention_mask)), None


def _key_mask(attention_mask: Tensor) -> Tensor:
    """(batch, length) from (batch, 1, length, length), where a pair takes part if both of its tokens do."""
    pairs = attention_mask.bool()
    keys = pairs.any(-2)
    if not torch.compiler.is_compiling() and not bool((pairs == keys[..., None, :] & keys[..., None]).all()):
        raise NotImplementedError("attention_mask: expected one that tells tokens from padding, got one of pairs")
    return keys[:, 0]


def use_disentangled_attention(model: nn.Module) -> int:
    """Has the ``DebertaV2`` layers of a model attend by :func:`attnx.disentangled_attention`.

    Each ``DisentangledSelfAttention`` of transformers in the model is replaced by one of attnx that has the same
    parameters, under the same names: states load and save as before. Relative positions are those of the model's
    configuration. Padding tokens, whose outputs nobody uses, get other outputs than in transformers.

    Args:
        model: any model of transformers' with DeBERTa-v2 or -v3 layers, on the CPU.

    Returns:
        How many modules were replaced.

    Raises:
        ValueError: the model has no such module, or one without relative positions.
    """
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention as Theirs

    children = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    found = [(parent, name, x) for parent, name, x in children if type(x) is Theirs]
    if not found:
        raise ValueError(f"model: expected one with DebertaV2 layers, got {type(model).__name__} without")
    converted = [(parent, name, _converted(theirs)) for parent, name, theirs in found]
    for parent, name, ours in converted:
        setattr(parent, name, ours)
    return len(converted)


def _converted(theirs: Any) -> _SelfAttention:
    if not theirs.relative_attention or not {"c2p", "p2c"} & set(theirs.pos_att_type):
        raise ValueError(
            f"model: expected relative_attention with c2p or p2c, got {theirs.relative_attention} with "
            f"{theirs.pos_att_type}"
        )
    weight = theirs.query_proj.weight
    ours = _SelfAttention(
        weight.shape[1],
        theirs.num_attention_heads,
        span=theirs.pos_ebd_size,
        max_distance=theirs.max_relative_positions if theirs.position_buckets > 0 else None,
        c2p="c2p" in theirs.pos_att_type,
        p2c="p2c" in theirs.pos_att_type,
        share_projections=theirs.share_att_key,
        dropout=theirs.dropout.p,
        position_dropout=theirs.pos_dropout.p,
        device="meta",
    )
    for name, child in theirs.named_children():
        if name != "dropout":  # a Linear each, and pos_dropout
            setattr(ours, name, child)
    return ours.train(theirs.training)
