"""Operators called with what no function of the package would pass on refuse it or serve it, and never crash."""

from __future__ import annotations

import os

import pytest
import torch

from fuzz_operators import fuzz

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

CALLS = int(os.environ.get("ATTNX_FUZZ_CALLS", "1200"))


def test_hostile_calls() -> None:
    done = fuzz(CALLS)
    assert not done.failures, "\n\n".join(done.failures)
    assert done.report.calls == CALLS
    assert min(done.report.served, done.report.refused) > CALLS // 10  # both kinds are drawn


@pytest.mark.parametrize("how", ["signal", "error"])
def test_a_crash_shows(how: str) -> None:
    """The same with an operator that fails: its call is named."""
    # SIGKILL, as sanitizers answer others.
    fault = {"signal": "import os; os.kill(os.getpid(), 9)", "error": "raise AssertionError('planted')"}[how]
    done = fuzz(40, operators=["sparse_linear_labels"], before_each_call=fault)
    assert done.failures
    assert "sparse_linear_labels\n  products = torch.float32 (2, 4, 3, 4)" in done.failures[0]
    assert ("SIGKILL" if how == "signal" else "AssertionError: planted") in done.failures[0]


LABELS = {
    "negative share": ((0.3, -0.5, 0), "negligible: expected a share of the blocks from 0 to 1, got -0.5"),
    "share of nan": ((float("nan"), 0.1, 0), "critical: expected a share of the blocks from 0 to 1, got nan"),
    "shares above 1": ((0.7, 0.6, 0), "critical, negligible: expected shares of at most 1 together"),
    "negative protection": ((0.3, 0.3, -1), "protect: expected a number of keys, 0 or more, got -1"),
}


@pytest.mark.parametrize(("options", "message"), LABELS.values(), ids=LABELS)
def test_labels_and_maps_check_their_shares(options: tuple[float, float, int], message: str) -> None:
    products, x = torch.randn(1, 1, 3, 3), torch.randn(1, 1, 192, 16)
    critical, negligible, protect = options
    offsets = torch.tensor([0, 192], dtype=torch.int32)
    sizes = (offsets, offsets, 192, 192)
    calls = (
        lambda: torch.ops.attnx.sparse_linear_labels(
            products, 192, 192, 64, 64, critical, negligible, "ceil", False, protect
        ),
        lambda: torch.ops.attnx.sparse_linear_block_map(
            x, x, None, None, 64, 64, critical, negligible, "ceil", False, protect, None, False
        ),
        lambda: torch.ops.attnx.sparse_linear_block_map_varlen(
            x[0].transpose(0, 1),
            x[0].transpose(0, 1),
            *sizes,
            64,
            64,
            critical,
            negligible,
            "ceil",
            False,
            protect,
            None,
            False,
        ),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()


def test_protection_of_all_keys() -> None:
    products = torch.randn(1, 1, 3, 3)
    labels = torch.ops.attnx.sparse_linear_labels(products, 192, 192, 64, 64, 0.1, 0.1, "ceil", False, 2**63 - 1)
    assert (labels == 1).all()


BAD_MAPS = {
    "dtype": ({"key": torch.zeros(192, 2, 16, dtype=torch.float64)}, "key: expected float32 like query, got float64"),
    "integers": ({"query": torch.zeros(192, 2, 16, dtype=torch.int64)}, "query: expected one of .*, got int64"),
    "rank": ({"key": torch.zeros(192, 16)}, "key: expected 3 dimensions"),
    "heads": ({"key": torch.zeros(192, 3, 16)}, "query: expected heads to be a multiple of the 3 heads of key, got 2"),
    "head_dim": ({"key": torch.zeros(192, 2, 8)}, "key: expected shape"),
    "no head_dim": ({"query": torch.zeros(192, 2, 0)}, r"query: expected head_dim from 1 to 256 \(.*\), got 0"),
    "int64 offsets": ({"cu_seqlens_k": torch.tensor([0, 192])}, "cu_seqlens_k: expected int32, got int64"),
    "start": ({"cu_seqlens_q": torch.tensor([1, 192]).int()}, "cu_seqlens_q: expected to start at 0, got 1"),
    "falling": ({"cu_seqlens_q": torch.tensor([0, 200, 192]).int()}, "cu_seqlens_q: expected rising offsets"),
    "end": ({"cu_seqlens_k": torch.tensor([0, 191]).int()}, "cu_seqlens_k: expected to end at the number of rows, 192"),
    "none": ({"cu_seqlens_k": torch.zeros(0).int()}, r"cu_seqlens_k: expected shape \(batch \+ 1,\)"),
    "batch": ({"cu_seqlens_k": torch.tensor([0, 5, 192]).int()}, "cu_seqlens_k: expected shape"),
    "max": ({"max_seqlen_q": 191}, "max_seqlen_q: expected at least the longest sequence, 192, got 191"),
    "block": ({"block_q": 0}, "block_size: expected 64 or 128 on each side"),
    "rounding": ({"rounding": "nearest"}, "rounding: expected ceil or floor, got nearest"),
    "scale": ({"scale": float("nan")}, "scale: expected a finite number, got nan"),
    "large scale": ({"scale": 1e39}, "scale: expected a number in the range of float32"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_MAPS.values(), ids=BAD_MAPS)
def test_maps_check_what_they_are_made_of(changes: dict[str, object], message: str) -> None:
    offsets = torch.tensor([0, 192], dtype=torch.int32)
    good: dict[str, object] = {
        "query": torch.zeros(192, 2, 16),
        "key": torch.zeros(192, 2, 16),
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets,
        "max_seqlen_q": 192,
        "max_seqlen_k": 192,
        "block_q": 64,
        "block_k": 64,
        "critical": 0.3,
        "negligible": 0.3,
        "rounding": "ceil",
        "smooth_k": False,
        "protect": 0,
        "scale": None,
        "is_causal": False,
    }
    torch.ops.attnx.sparse_linear_block_map_varlen(**good)
    with pytest.raises(RuntimeError, match=f"^{message}"):
        torch.ops.attnx.sparse_linear_block_map_varlen(**good | changes)
