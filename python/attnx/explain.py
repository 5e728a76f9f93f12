"""Which kernel a call would use and why, or why none and what is nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from attnx import _C, _capability, functional


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``print`` it."""

    operator: str
    supported: bool
    backend: str | None = None
    kernel: str | None = None
    reasons: list[str] = field(default_factory=list)
    nearest: str | None = None

    def __str__(self) -> str:
        head = f"{self.operator}: " + (f"{self.kernel} on {self.backend}" if self.supported else "no kernel")
        lines = [head, *(f"  - {reason}" for reason in self.reasons)]
        if self.nearest:
            lines.append(f"  nearest: {self.nearest}")
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel ``function(*args, **kwargs)`` would use and why, or why not and what is nearest.

    Nothing is computed, and the values of the tensors are not looked at.

    Args:
        function: an operator of attnx, such as ``attnx.sigmoid_attention``.
        args, kwargs: what it would be called with.

    Returns:
        An :class:`Explanation`: ``supported``, ``backend``, ``kernel``, ``reasons``, ``nearest``.

    Raises:
        ValueError: function is not an operator of attnx.
        TypeError: the arguments do not fit its signature.
    """
    name = getattr(function, "__name__", str(function))
    if getattr(functional, name, None) is not function:
        raise ValueError(f"function: expected an operator of attnx, such as attnx.sigmoid_attention, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments["window_left"], arguments["window_right"] = arguments.pop("window")
    if not isinstance(arguments.get("bias"), Tensor):
        arguments["bias"] = None  # a rule or a number, which every kernel adds

    requirement = _capability.Requirement.of(name, arguments)
    row = _capability.nearest(requirement)
    missing = requirement.missing(row)
    if missing:
        reasons = [f"the call requires {requirement}", f"missing: {', '.join(missing)}"]
        return Explanation(name, False, reasons=reasons, nearest=_capability.describe(row))
    return Explanation(name, True, row.backend, *_cpu_kernel(requirement))


def _cpu_kernel(requirement: _capability.Requirement) -> tuple[str, list[str]]:
    instruction_set = _C.cpu_instruction_set()
    reasons = [
        f"the tensors are on {requirement.backend}",
        f"of the instruction sets built, {', '.join(_C.build_info()['cpu_instruction_sets'])}, this machine runs "
        f"{', '.join(_C.cpu_instruction_sets())}; {instruction_set} is in use",
    ]
    if requirement.dtype in ("bfloat16", "float16"):
        pairs = requirement.dtype == "bfloat16" and instruction_set == "avx512_bf16"
        products = "bfloat16 pairs, summed in float32" if pairs else "float32, after converting each tile"
        reasons.append(f"{requirement.dtype} is multiplied as {products}")
    return f"{requirement.operator} [{instruction_set}]", reasons
