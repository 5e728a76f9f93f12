"""Some buffers keep their dtype, whatever their module is converted to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from typing_extensions import Self


class KeepsDtype(nn.Module):
    keeps_dtype: tuple[str, ...] = ()  # these buffers stay float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.keeps_dtype}
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = getattr(self, name)
            if moved.dtype != x.dtype:
                setattr(self, name, x.to(moved.device))
        return self
