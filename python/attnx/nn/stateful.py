"""What modules share that read a sequence in pieces, or token by token, by a state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from attnx import _arguments

State: TypeAlias = tuple[Tensor, ...]


class StatefulAttention(nn.Module):
    """A causal attention that goes on from a state.

    A state is a tuple of tensors whose first dimension is the batch, so that sequences are picked or reordered by
    ``tuple(x[rows] for x in state)``. It is never written to: a state may be gone on from several times.
    """

    embed_dim: int

    @abstractmethod
    def attend(self, x: Tensor, state: State | None, wants_state: bool) -> tuple[Tensor, State]:
        """The outputs, and the state after the last token, which is empty where it is not wanted."""

    @abstractmethod
    def state_shapes(self, batch: int) -> Sequence[tuple[int | None, ...]]:
        """The shapes of a state's tensors; a size that the sequence decides is None."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends from each token to itself and those before it.

        Args:
            x: (batch, length, embed_dim).

        Returns:
            (batch, length, embed_dim).

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected and what came.
        """
        self._check(x, None)
        return self.attend(x, None, wants_state=False)[0]

    def prefill(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attends from the tokens of a piece of a sequence to each other and to what came before it.

        Args:
            x: (batch, length, embed_dim), the next tokens.
            state: what the piece before returned; None at the start.

        Returns:
            (batch, length, embed_dim), and the state after the piece.

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected and what came.
        """
        self._check(x, state)
        return self.attend(x, state, wants_state=True)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Attends from one more token.

        Args:
            x: (batch, embed_dim).
            state: as of :meth:`prefill`.

        Returns:
            (batch, embed_dim), and the state after the token.

        Raises:
            ValueError: an argument does not fit; the message names it, what was expected and what came.
        """
        if not isinstance(x, Tensor) or x.dim() != 2:
            raise ValueError(f"x: expected (batch, {self.embed_dim}), got {_arguments.describe(x)}")
        output, state = self.prefill(x[:, None], state)
        return output[:, 0], state

    def _check(self, x: Tensor, state: State | None) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(f"x: expected (batch, length, {self.embed_dim}), got {_arguments.describe(x)}")
        if state is None:
            return
        shapes = self.state_shapes(x.shape[0])
        if not isinstance(state, tuple) or len(state) != len(shapes):
            raise ValueError(f"state: expected a tuple of {len(shapes)} tensors, got {_arguments.describe(state)}")
        for i, (of_state, shape) in enumerate(zip(state, shapes, strict=True)):
            fits = isinstance(of_state, Tensor) and of_state.dim() == len(shape)
            if not fits or any(n not in (None, m) for n, m in zip(shape, of_state.shape, strict=True)):
                expected = ", ".join("any" if n is None else str(n) for n in shape)
                raise ValueError(f"state[{i}]: expected shape ({expected}), got {_arguments.describe(of_state)}")


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and gates of rows of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
