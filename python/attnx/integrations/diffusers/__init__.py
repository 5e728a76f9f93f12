"""This package has attention backends for diffusers, and sparse-linear attention that is fine-tuned there.

attnx.integrations.diffusers.register()
model.set_attention_backend("attnx_softmax")
"""

from attnx.integrations.diffusers.backends import register
from attnx.integrations.diffusers.sparse_linear import apply_sparse_linear, load_sparse_linear

__all__ = ["apply_sparse_linear", "load_sparse_linear", "register"]
