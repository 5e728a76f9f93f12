"""attnx in transformers: attention implementations, and a quantised cache.

attnx.integrations.transformers.register()
model.set_attn_implementation("attnx_softmax")
"""

from attnx.integrations.transformers.attention import register
from attnx.integrations.transformers.cache import StaircaseCache
from attnx.integrations.transformers.deberta import use_disentangled_attention
from attnx.integrations.transformers.delta_rule import use_gated_delta_rule
from attnx.integrations.transformers.switching import switch

__all__ = ["StaircaseCache", "register", "switch", "use_disentangled_attention", "use_gated_delta_rule"]
