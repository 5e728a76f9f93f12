"""The attention operators as modules."""

from attnx.nn.affine import AffineScaledAttention
from attnx.nn.based import BasedAttention
from attnx.nn.bottleneck import DiscreteKeyValueBottleneck
from attnx.nn.disentangled import DisentangledSelfAttention
from attnx.nn.gated_delta_net import GatedDeltaNet
from attnx.nn.head_routing import HeadRoutedAttention
from attnx.nn.hierarchical import BoundaryPredictor, HierarchicalSparseAttention
from attnx.nn.hybrid_chunk import HybridChunkAttention
from attnx.nn.pointer import PointerHead
from attnx.nn.probabilistic import ProbabilisticAttention
from attnx.nn.routing import RoutingAttention
from attnx.nn.sigmoid import SigmoidAttention
from attnx.nn.softplus import SoftplusAttention
from attnx.nn.sparse_linear import SparseLinearAttention

__all__ = [
    "AffineScaledAttention",
    "BasedAttention",
    "BoundaryPredictor",
    "DiscreteKeyValueBottleneck",
    "DisentangledSelfAttention",
    "GatedDeltaNet",
    "HeadRoutedAttention",
    "HierarchicalSparseAttention",
    "HybridChunkAttention",
    "PointerHead",
    "ProbabilisticAttention",
    "RoutingAttention",
    "SigmoidAttention",
    "SoftplusAttention",
    "SparseLinearAttention",
]
