"""One file per system; a new suite is one more entry here."""

from suite import Suite
from suites import (
    dense,
    distances,
    flash,
    hierarchical,
    jvp,
    probabilistic,
    rectified,
    routing,
    routing_gpu,
    softplus,
    sparse_linear,
    staircase,
    states,
    terms,
    varlen,
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        dense.SUITE,
        distances.SUITE,
        flash.SUITE,
        flash.FLEX_SUITE,
        flash.DETERMINISTIC_SUITE,
        jvp.SUITE,
        varlen.SUITE,
        hierarchical.SUITE,
        sparse_linear.SUITE,
        sparse_linear.GPU_SUITE,
        sparse_linear.LENGTHS_SUITE,
        probabilistic.SUITE,
        probabilistic.GPU_SUITE,
        rectified.SUITE,
        rectified.GPU_SUITE,
        routing.SUITE,
        routing.LENGTHS_SUITE,
        routing_gpu.SUITE,
        softplus.SUITE,
        staircase.SUITE,
        staircase.GPU_SUITE,
        states.DELTA_SUITE,
        states.HYBRID_SUITE,
        states.TAYLOR_SUITE,
        terms.SUITE,
    )
}
