"""What torch must know of the sparse-linear operators: shapes, gradients, autocast, refusals."""

from __future__ import annotations

from attnx import _operators

NAMES = ("sparse_linear_attention", "sparse_linear_attention_varlen")


def register() -> None:
    for name in NAMES:
        for each in (name, f"{name}_backward"):
            _operators.register_refusal(each)
            _operators.register_fake(each)
            _operators.register_looping_vmap(each)
        _operators.register_autograd(name)
        _operators.refuse_double_backward(f"{name}_backward")
        for device_type in ("cpu", "cuda"):
            _operators.register_autocast(name, device_type)
