"""A row of the table says of an operator what its schema does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from attnx import _capability
from attnx._operators.schema import Arguments


@dataclass(frozen=True)
class BackwardOperator:
    """The derivative is the operator ``{name}_backward``.

    Its schema says what is saved: it takes the forward's arguments and results by their names, the gradient of a result
    x as grad_x, ``deterministic``, and, for gradients that are made on request, whether that of an argument x is wanted
    as x_gradient. Where it takes ``Tensor? grad_x``, those of results that nobody used are None. Each result grad_x of
    it is the gradient of the argument x.

    Attributes:
        more: computes further arguments of the backward operator from all others.
    """

    more: Callable[[Arguments], Arguments] | None = None


@dataclass(frozen=True)
class Formula:
    """The derivative is a Python function; both functions are as ``torch.library.register_autograd`` takes them."""

    save: Callable[[Any, tuple[Any, ...], Any], None]
    gradient: Callable[..., Any]


@dataclass(frozen=True)
class NoDerivative:
    """There is no derivative, and asking for it raises the reason."""

    why: str


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    An optional tensor argument is a number for each head, (heads,) or (), unless ``shapes`` says otherwise of its
    gradient; it needs no entry here.

    Attributes:
        name: the operator's name in ``torch.ops.attnx``.
        derivative: where gradients come from.
        varlen: whether there is ``{name}_varlen``, too, for packed sequences.
        shapes: the result of each name that does not follow the rules of the module ``shapes``.
        fake: computes all results instead, from the arguments by name.
        vmap: whether examples become more heads of one call, or each example is a call of its own. Operators that
            write to their arguments refuse it.
        jvp: whether tangents pass, by the operator ``{name}_jvp``, which has a row of its own; not those of
            ``{name}_varlen``. Its schema says beside which arguments they do; others must be None, False or 0.
        autocast: the arguments that autocast converts to its dtype. It leaves float64 alone, and all other floating
            point tensors become float32. Without any the operator takes its arguments as they come.
        autocast_like: the argument whose dtype those get instead; all others then stay as they come.
        flops: what torch.utils.flop_counter counts, from the arguments and whether it is the backward; None: nothing.
        refusal: the message where no kernel serves the call, from the operator's name and its arguments.
        implementation: serves calls that no kernel serves, instead of the refusal.
        schema: the schema of an operator that is defined here and not in C++.
    """

    name: str
    derivative: BackwardOperator | Formula | NoDerivative = BackwardOperator()
    varlen: bool = False
    shapes: Mapping[str, Callable[[Arguments], Tensor]] = field(default_factory=dict)
    fake: Callable[..., Any] | None = None
    vmap: Literal["heads", "loop"] = "loop"
    jvp: bool = False
    autocast: tuple[str, ...] = ()
    autocast_like: str | None = None
    flops: Callable[[Arguments, bool], int] | None = None
    refusal: Callable[[str, Arguments], str] = _capability.refusal
    implementation: Callable[..., Any] | None = None
    schema: str | None = None

    @property
    def forward_names(self) -> tuple[str, ...]:
        return (self.name, f"{self.name}_varlen") if self.varlen else (self.name,)

    @property
    def names(self) -> tuple[str, ...]:
        """All operators that this row describes."""
        if not isinstance(self.derivative, BackwardOperator):
            return self.forward_names
        return (*self.forward_names, *(f"{name}_backward" for name in self.forward_names))
