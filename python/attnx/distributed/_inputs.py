"""What holds for the queries, keys and values of every ring."""

from __future__ import annotations

import torch
from torch import Tensor

from attnx import _arguments
from attnx.distributed.sequence import Layout


def check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    """Checks what must hold before anything is sent; operators check the rest when they are called first."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            _arguments.refuse(name, "(batch, heads, length, head_dim)", x)
        if x.dtype != query.dtype or x.device != query.device:
            raise RuntimeError(
                f"{name}: expected {query.dtype} on {query.device} like query, got {x.dtype} on {x.device}"
            )
        if layout == "zigzag" and x.shape[2] % 2:
            _arguments.refuse(name, 'two chunks of one length, as layout="zigzag" has them', x)
    batch, heads, _, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        _arguments.refuse("key", f"({batch}, kv_heads, length_k, {head_dim})", key)
    if key.shape[1] == 0 or heads % key.shape[1]:
        _arguments.refuse("key", f"a number of heads that divides the {heads} of query", key)
    if value.shape[:3] != key.shape[:3]:
        _arguments.refuse("value", f"({', '.join(map(str, key.shape[:3]))}, value_dim)", value)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts as autocast does before an operator: what travels shall have that dtype, too."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
