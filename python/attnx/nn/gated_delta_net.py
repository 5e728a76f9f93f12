"""The layer of Gated DeltaNet, as Qwen3-Next has it, as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnx.delta_rule import gated_delta_rule
from attnx.nn.projections import positive
from attnx.nn.stateful import State, StatefulAttention, sum_dtype

__all__ = ["GatedDeltaNet"]


class GatedRMSNorm(nn.Module):
    """RMSNorm of x, times silu(gate)."""

    def __init__(self, size: int, eps: float, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normalised = F.rms_norm(x.to(sum_dtype(x)), x.shape[-1:], eps=self.eps).to(gate.dtype)
        return (self.weight * normalised * F.silu(gate.to(sum_dtype(gate)))).to(gate.dtype)


class GatedDeltaNet(StatefulAttention):
    r"""The layer of Gated DeltaNet as Qwen3-Next has it, around :func:`attnx.gated_delta_rule`.

    Query, key and value are projected and go through a short causal convolution of each feature and silu; queries and
    keys are brought to norm 1. Decays are :math:`g = -e^{A} \text{softplus}(a + \text{dt})` and shares of the update
    :math:`\beta = \text{sigmoid}(b)`, of projections a and b of the token. A head's output is normalised, gated by
    silu of one more projection, and projected.

    Its parameters have the names and shapes of transformers' ``Qwen3NextGatedDeltaNet``, whose state it loads. There is
    no cache that grows: the state is that of each head, and the last tokens ahead of the convolution.

    Args:
        embed_dim: features of a token.
        num_heads: heads of queries and keys.
        num_value_heads: heads of values, a multiple of num_heads; 2 * num_heads by default, as in Qwen3-Next.
        head_dim: features of a query and a key.
        value_dim: features of a value; head_dim by default.
        conv_size: tokens that the convolution sees, the token's own and those before it.
        norm_eps: of the norm of outputs.
        device, dtype: of the parameters.

    Shapes:
        x: (batch, length, embed_dim). Padding before a sequence must be 0: it leaves a state of 0 as it is.
        output: (batch, length, embed_dim).
        state: (the conv_size - 1 last tokens ahead of the convolution, (batch, features, conv_size - 1) in the dtype of
            x; the state of :func:`attnx.gated_delta_rule`, (batch, num_value_heads, head_dim, value_dim)).

    Raises:
        ValueError: an argument does not fit; the message names it, what was expected and what came.

    Sources: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464; the layer is that
    of Qwen3-Next.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_value_heads: int | None = None,
        head_dim: int = 128,
        value_dim: int | None = None,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = positive("embed_dim", embed_dim), positive("num_heads", num_heads)
        self.num_value_heads = positive(
            "num_value_heads", 2 * num_heads if num_value_heads is None else num_value_heads
        )
        if self.num_value_heads % num_heads:
            raise ValueError(
                f"num_value_heads: expected a multiple of num_heads = {num_heads}, got {self.num_value_heads}"
            )
        self.head_dim = positive("head_dim", head_dim)
        self.value_dim = positive("value_dim", head_dim if value_dim is None else value_dim)
        self.conv_size = positive("conv_size", conv_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, values = num_heads * head_dim, self.num_value_heads * self.value_dim
        self.conv_dim = 2 * keys + values
        self.in_proj_qkvz = nn.Linear(embed_dim, 2 * keys + 2 * values, bias=False, **factory)
        self.in_proj_ba = nn.Linear(embed_dim, 2 * self.num_value_heads, bias=False, **factory)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, conv_size, groups=self.conv_dim, bias=False, **factory)
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads, **factory))
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads, **factory))
        self.norm = GatedRMSNorm(self.value_dim, norm_eps, device, dtype)
        self.out_proj = nn.Linear(values, embed_dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives ``dt_bias`` and ``A_log`` their start; the submodules have a reset_parameters of their own."""
        nn.init.ones_(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()

    @classmethod
    def from_transformers(cls, layer: Any) -> GatedDeltaNet:
        """A module with the parameters of a ``Qwen3NextGatedDeltaNet`` of transformers, copied.

        Raises:
            ValueError: it is no such layer, or one with another activation than silu.
        """
        if type(layer).__name__ != "Qwen3NextGatedDeltaNet":
            raise ValueError(f"layer: expected Qwen3NextGatedDeltaNet of transformers, got {type(layer).__name__}")
        if layer.activation not in ("silu", "swish"):
            raise ValueError(f"layer: expected the activation silu, got {layer.activation}")
        module = cls(
            layer.hidden_size,
            layer.num_k_heads,
            num_value_heads=layer.num_v_heads,
            head_dim=layer.head_k_dim,
            value_dim=layer.head_v_dim,
            conv_size=layer.conv_kernel_size,
            norm_eps=layer.layer_norm_epsilon,
            device=layer.out_proj.weight.device,
            dtype=layer.out_proj.weight.dtype,
        )
        module.load_state_dict(layer.state_dict())
        return module.train(layer.training)

    def attend(self, x: Tensor, state: State | None, wants_state: bool) -> tuple[Tensor, State]:
        tokens, before = (None, None) if state is None else state
        mixed, gate, log_decay, beta = self._project(x)
        mixed, tokens = self._convolve(mixed, tokens)
        heads, group = self.num_heads, self.num_value_heads // self.num_heads
        query, key, value = mixed.split([heads * self.head_dim] * 2 + [heads * group * self.value_dim], 2)
        query, key = (y.unflatten(2, (heads, -1)).transpose(1, 2) for y in (query, key))
        value = value.unflatten(2, (heads * group, -1)).transpose(1, 2)
        output, after = gated_delta_rule(
            query, key, value, log_decay, beta, initial_state=before, normalize_qk=True, return_state=True
        )
        output = self.norm(output.transpose(1, 2), gate)
        return self.out_proj(output.flatten(2)), (tokens, after) if wants_state else ()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes into the convolution, the gate of outputs, log decays and beta; parts lie head of keys by head."""
        heads, group = self.num_heads, self.num_value_heads // self.num_heads
        values = group * self.value_dim
        parts = self.in_proj_qkvz(x).unflatten(2, (heads, -1)).split([self.head_dim, self.head_dim, values, values], 3)
        mixed = torch.cat([part.flatten(2) for part in parts[:3]], 2)
        b, a = (y.flatten(1, 2) for y in self.in_proj_ba(x).mT.unflatten(1, (heads, 2, group)).unbind(2))
        return (
            mixed,
            parts[3].reshape(*x.shape[:2], heads * group, self.value_dim),
            log_decays(a, self.A_log, self.dt_bias),
            b.to(sum_dtype(b)).sigmoid(),
        )

    def _convolve(self, mixed: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The convolution's outputs, and the tokens that the next one needs."""
        if before is None:
            before = mixed.new_zeros(mixed.shape[0], self.conv_dim, self.conv_size - 1)
        rows = torch.cat((before, mixed.mT), 2)
        after = rows[:, :, mixed.shape[1] :].clone()  # it does not keep the memory of a whole prompt
        if mixed.shape[1] == 0:
            return mixed, after
        return F.silu(self.conv1d(rows).mT.contiguous()), after

    def state_shapes(self, batch: int) -> Sequence[tuple[int | None, ...]]:
        return [
            (batch, self.conv_dim, self.conv_size - 1),
            (batch, self.num_value_heads, self.head_dim, self.value_dim),
        ]

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_value_heads={self.num_value_heads}, "
            f"head_dim={self.head_dim}, value_dim={self.value_dim}, conv_size={self.conv_size}"
        )


def log_decays(x: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Those of (batch, heads, length) numbers of tokens, in float32 (float64 for float64)."""
    sums = sum_dtype(x)
    # Of tensors that lie differently in memory, softplus_backward gives other strides than torch.compile takes it to.
    numbers = x.to(sums).contiguous() + dt_bias.to(sums)[:, None]
    return -A_log.to(sums).exp()[:, None] * F.softplus(numbers)
