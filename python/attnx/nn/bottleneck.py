"""A bottleneck of discrete keys with learned values as a module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.nn.buffers import KeepsDtype
from attnx.nn.projections import positive

__all__ = ["DiscreteKeyValueBottleneck"]

_PAIRS_AT_ONCE = 4096  # of a codebook and a key, whose scores a token has at one time


class DiscreteKeyValueBottleneck(KeepsDtype):
    r"""Replaces what a token is by values that belong to the nearest keys of several codebooks.

    .. math:: k_c(x) = \arg\min_k |z_c - \kappa_{ck}| = \arg\max_k\, z_c \cdot \kappa_{ck} - |\kappa_{ck}|^2 / 2,
        \qquad y = \frac 1 C \sum_c v_{c, k_c(x)}

    Of equals the first key counts. Values are learned; keys stand. A gradient reaches only the values that were taken,
    so that what is learned about some tokens leaves the values of others alone, as continual learning wants it. The
    tokens get no gradient: they come from an encoder that is not trained.

    Training has two stages. First the keys find their places: :meth:`init_keys_` puts them onto some tokens, and
    :meth:`update_keys_`, called with batch after batch, moves each to the moving average of the tokens next to it. Then
    values are learned; calls leave the keys alone.

    Keys, their counts and the projection are buffers in float32, whatever the module is converted to, and distances are
    in float32, under autocast, too. A key's scores are in memory with few others at one time.

    Args:
        embed_dim: features of a token.
        num_codebooks: C.
        num_keys: of each codebook.
        key_dim: features of a key. A token is projected to each codebook by a random matrix that stands. None: no
            projection; each codebook has an equal share of the features, of which num_codebooks is a divisor.
        value_dim: features of a value; embed_dim by default.
        decay: of the keys' moving average, from 0 to 1.
        device: the device of the parameters and buffers.
        dtype: the dtype of the values.

    Shapes:
        x: (..., embed_dim).
        output: (..., value_dim), in the dtype of the values.

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Sources: Träuble et al., "Discrete Key-Value Bottleneck", arXiv 2207.11240; the moving average is that of van den
    Oord et al., "Neural Discrete Representation Learning", arXiv 1711.00937, appendix A.
    """

    keys: Tensor
    counts: Tensor
    projection: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_codebooks: int,
        num_keys: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        decay: float = 0.95,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = positive("embed_dim", embed_dim)
        self.num_codebooks = positive("num_codebooks", num_codebooks)
        self.num_keys = positive("num_keys", num_keys)
        self.value_dim = positive("value_dim", embed_dim if value_dim is None else value_dim)
        if key_dim is None and embed_dim % num_codebooks:
            raise ValueError(
                f"num_codebooks: expected a divisor of embed_dim = {embed_dim} where key_dim is not given, got "
                f"{num_codebooks}"
            )
        self.key_dim = positive("key_dim", embed_dim // num_codebooks if key_dim is None else key_dim)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected from 0 to 1, got {decay!r}")
        self.decay = decay

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.register_buffer("keys", empty(num_codebooks, num_keys, self.key_dim))
        self.register_buffer("counts", empty(num_codebooks, num_keys))
        self.register_buffer(
            "projection", None if key_dim is None else empty(num_codebooks, self.embed_dim, self.key_dim)
        )
        self.keeps_dtype = ("keys", "counts") if key_dim is None else ("keys", "counts", "projection")
        self.values = nn.Parameter(torch.empty(num_codebooks, num_keys, self.value_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws keys, values and the projection anew."""
        nn.init.normal_(self.keys)
        nn.init.ones_(self.counts)
        nn.init.normal_(self.values)
        if self.projection is not None:
            nn.init.normal_(self.projection, std=self.embed_dim**-0.5)  # lengths stay what they are, about

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean of the values that belong to the nearest keys."""
        first = torch.arange(self.num_codebooks, device=x.device) * self.num_keys
        index = (self.nearest(x) + first).flatten(0, -2)
        return F.embedding_bag(index, self.values.flatten(0, 1), mode="mean").unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Returns the nearest key of each codebook, (..., num_codebooks) int64."""
        return self._nearest(self._project(x)).mT.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def init_keys_(self, x: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Puts the keys of each codebook onto tokens of ``x``, (..., embed_dim), drawn without repetition while there
        are as many; what :meth:`update_keys_` counted before is forgotten.
        """
        rows = self._project(x)
        tokens = rows.shape[1]
        if tokens == 0:
            raise ValueError(f"x: expected one token at least, got a tensor of shape {tuple(x.shape)}")
        for c in range(self.num_codebooks):
            order = torch.randperm(tokens, device=x.device, generator=generator)
            self.keys[c] = rows[c, order.repeat(-(-self.num_keys // tokens))[: self.num_keys]]
        self.counts.fill_(1)

    @torch.no_grad()
    def update_keys_(self, x: Tensor) -> None:
        """Moves each key to the moving average of the tokens of ``x``, (..., embed_dim), that it is the nearest key of,
        those of calls before included; a key that is nobody's stays.
        """
        rows = self._project(x)
        index = self._nearest(rows)
        count = torch.zeros_like(self.counts).scatter_add_(1, index, torch.ones_like(rows[..., 0]))
        total = torch.zeros_like(self.keys).scatter_add_(1, index[..., None].expand_as(rows), rows)
        self.counts.mul_(self.decay).add_(count, alpha=1 - self.decay)
        step = (1 - self.decay) * (total - count[..., None] * self.keys)
        self.keys.add_(step / self.counts[..., None].clamp(min=torch.finfo(torch.float32).tiny))

    def _project(self, x: Tensor) -> Tensor:
        """Returns the projected tokens, (num_codebooks, tokens, key_dim) float32."""
        if x.dim() < 1 or x.shape[-1] != self.embed_dim or not x.is_floating_point():
            raise ValueError(
                f"x: expected floating point of shape (..., {self.embed_dim}), got {x.dtype} of shape {tuple(x.shape)}"
            )
        rows = x.detach().float().reshape(-1, self.embed_dim)
        if self.projection is None:
            return rows.unflatten(1, (self.num_codebooks, self.key_dim)).transpose(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            return rows @ self.projection

    def _nearest(self, rows: Tensor) -> Tensor:
        """Returns the nearest keys, (num_codebooks, tokens)."""
        some = math.ceil(_PAIRS_AT_ONCE / self.num_codebooks)
        largest = torch.full_like(rows[..., 0], -torch.inf)
        index = torch.zeros_like(largest, dtype=torch.int64)
        with torch.autocast(rows.device.type, enabled=False):
            for first in range(0, self.num_keys, some):
                keys = self.keys[:, first : first + some]
                scores = torch.baddbmm(keys.square().sum(-1)[:, None], rows, keys.mT, beta=-0.5)
                own, at = scores.max(-1)
                is_larger = own > largest
                largest, index = own.where(is_larger, largest), (at + first).where(is_larger, index)
        return index

    def extra_repr(self) -> str:
        sizes = f"embed_dim={self.embed_dim}, num_codebooks={self.num_codebooks}, num_keys={self.num_keys}"
        return f"{sizes}, key_dim={self.key_dim}, value_dim={self.value_dim}, decay={self.decay}"
