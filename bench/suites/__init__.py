"""One file per system; a new suite is one more entry here."""

from suite import Suite
from suites import (
    dense,
    distances,
    flash,
    jvp,
    probabilistic,
    routing,
    routing_gpu,
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
        sparse_linear.SUITE,
        sparse_linear.GPU_SUITE,
        sparse_linear.LENGTHS_SUITE,
        probabilistic.SUITE,
        probabilistic.GPU_SUITE,
        routing.SUITE,
        routing.LENGTHS_SUITE,
        routing_gpu.SUITE,
        staircase.SUITE,
        staircase.GPU_SUITE,
        states.DELTA_SUITE,
        states.TAYLOR_SUITE,
        terms.SUITE,
    )
}
