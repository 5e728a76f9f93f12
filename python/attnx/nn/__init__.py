"""The attention operators as modules."""

from attnx.nn.sigmoid import SigmoidAttention

__all__ = ["SigmoidAttention"]
