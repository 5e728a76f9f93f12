"""This package has attention backends for diffusers, sparse-linear attention that is fine-tuned there, and rectified
sparse attention for models as they are.

attnx.integrations.diffusers.register()
model.set_attention_backend("attnx_softmax")
"""

from attnx.integrations.diffusers.backends import register
from attnx.integrations.diffusers.rectified import apply_rectified
from attnx.integrations.diffusers.sparse_linear import apply_sparse_linear, load_sparse_linear

__all__ = ["apply_rectified", "apply_sparse_linear", "load_sparse_linear", "register"]
