"""Numbers of which a compiled or exported program asks nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

# These take the symbol from the environment of shapes itself, as ``torch.library.get_ctx().new_dynamic_size()`` serves
# only those who set ``torch._dynamo.config.capture_dynamic_output_shape_ops``.


def unguarded(size: int | torch.SymInt) -> int | torch.SymInt:
    """The size, or a symbol of its own where the size is one that torch would ask whether it is 1.

    A number of blocks is 1 for short sequences alone, and a graph that asks serves either these or all others.
    """
    if isinstance(size, int) or statically_known_true(size != 1):
        return size
    return size.node.shape_env.create_unbacked_symint()


def unknown(sizes: Iterable[int | torch.SymInt]) -> torch.SymInt | None:
    """A symbol of its own for what follows from sizes in no formula; None where all of them are known."""
    symbols = [x for x in sizes if isinstance(x, torch.SymInt)]
    return symbols[0].node.shape_env.create_unbacked_symint() if symbols else None
