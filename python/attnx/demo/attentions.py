"""The attentions that the demo compares. A further one is one more entry of ``ATTENTIONS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import attnx
from attnx import reference

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]

# Below -log(256), the rule for the model's 256 keys: weights clear of saturation single a key out as sharply as softmax
# does, and the model's output norm takes out how small they are.
SIGMOID_BIAS = -8.0


@dataclass(frozen=True)
class Attention:
    """Causal attention over (batch, heads, length, head_dim), and the float64 definition that its output is held to."""

    name: str
    label: str
    colour: str
    function: CausalAttention
    reference: CausalAttention


BASELINE = Attention(
    name="sdpa",
    label="PyTorch softmax",
    colour="#5f6b7a",
    function=partial(F.scaled_dot_product_attention, is_causal=True),
    reference=partial(reference.softmax_attention, is_causal=True),
)

ATTENTIONS = {
    attention.name: attention
    for attention in (
        BASELINE,
        Attention(
            name="softmax",
            label="attnx softmax",
            colour="#2f7fc1",
            function=partial(attnx.softmax_attention, is_causal=True),
            reference=partial(reference.softmax_attention, is_causal=True),
        ),
        Attention(
            name="sigmoid",
            label="attnx sigmoid",
            colour="#e07a1f",
            function=partial(attnx.sigmoid_attention, bias=SIGMOID_BIAS, is_causal=True),
            reference=partial(reference.sigmoid_attention, bias=SIGMOID_BIAS, is_causal=True),
        ),
    )
}
