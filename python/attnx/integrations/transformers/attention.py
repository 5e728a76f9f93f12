"""attnx's attentions as transformers' attention implementations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils.output_capturing import _active_collector

from attnx.integrations.transformers import scores
from attnx.integrations.transformers.cache import StaircaseLayer
from attnx.integrations.transformers.call import Call

__all__ = ["IMPLEMENTATIONS", "register"]

_STATELESS: dict[str, Callable[[Call], Tensor]] = {
    "attnx_softmax": scores.softmax,
    "attnx_sigmoid": scores.sigmoid,
    "attnx_probabilistic": scores.ProbabilisticScore().attend,
}
IMPLEMENTATIONS = (*_STATELESS, "attnx_sparse_linear", "attnx_routing", "attnx_block_sparse")


def register() -> None:
    """Adds attnx's attentions to transformers' implementations, for all models of this process.

    - ``attnx_softmax`` is what the model computes with ``sdpa`` or ``eager``, sinks, softcaps and position biases
      included. Keys may come from a :class:`StaircaseCache`, which does without these three.
    - ``attnx_sigmoid`` weighs each key by the sigmoid of its logit, less the logarithm of the number of keys that
      the row sees. A model has to be trained with it.
    - ``attnx_probabilistic`` trains with blocks of keys by chance, and is ``attnx_softmax`` in evaluation.
    - ``attnx_sparse_linear``, ``attnx_routing`` and ``attnx_block_sparse`` need parameters or options that
      :func:`switch` gives a model.

    ``model.set_attn_implementation("attnx_softmax")`` then switches to one of them, as does
    ``attn_implementation="attnx_softmax"`` where a model is made.
    """
    for name in IMPLEMENTATIONS:
        AttentionInterface.register(name, functools.partial(_attend, name))
        AttentionMaskInterface.register(name, sdpa_mask)


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    if output_attentions or any("attentions" in kind for kind in _active_collector.get() or ()):
        raise NotImplementedError(f"{name}: no output_attentions, as no kernel keeps the weights; use eager for them")
    layer: StaircaseLayer | None = getattr(key, "attnx_layer", None)
    if layer is not None:
        asked = {"softcap": softcap, "s_aux": s_aux, "position_bias": position_bias, "dropout": dropout or None}
        if refused := [argument for argument, x in asked.items() if x is not None]:
            raise NotImplementedError(
                f"{name}: a StaircaseCache does without {', '.join(refused)}, which the model asks for"
            )
        if layer.holds_more_than(key):
            return layer.attend(query, key, value, attention_mask, scale=scaling).transpose(1, 2).contiguous(), None
        layer.append(key, value, attention_mask)
    key, value, is_causal = _band(module, query, key, value, attention_mask, is_causal)
    call = Call(
        name,
        query,
        key,
        value,
        attention_mask,
        position_bias,
        is_causal=is_causal,
        is_cross=getattr(module, "attnx_is_cross", False),
        training=module.training,
        scale=scaling,
        dropout=dropout,
        softcap=softcap,
        sink=s_aux,
        window=sliding_window,
    )
    return _of(name, module)(call).transpose(1, 2).contiguous(), None


def _of(name: str, module: nn.Module) -> Callable[[Call], Tensor]:
    """Returns what :func:`switch` gave the module, or else what needs nothing."""
    own = getattr(module, "attnx", None)
    if own is not None and own.implementation == name:
        return own.attend
    if name in _STATELESS:
        return _STATELESS[name]
    raise ValueError(
        f"{name}: expected a model that attnx.integrations.transformers.switch has given parameters or options, got "
        f"one without; call switch(model, {name!r}, ...)"
    )


def _band(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool | None
) -> tuple[Tensor, Tensor, bool]:
    """The keys that count and whether they are masked causally, by the rules of transformers' sdpa.

    transformers leaves out the mask of one query, of as many queries as keys, and of a prompt whose keys are the first
    of a static cache.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    causal = bool(is_causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:
        key, value = key[:, :, :length], value[:, :, :length]
    return key, value, causal
