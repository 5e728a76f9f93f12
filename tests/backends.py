"""The backends that the suite runs on, and what the capability table says each of them has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import attnx
from attnx import _capability

OPERATORS = ["sigmoid_attention", "softmax_attention"]  # that the shared tests run


@dataclass(frozen=True)
class Backend:
    """Where the tensors lie, and whose kernels run: "cpu" or "cuda", as the capability table calls them.

    The ``emulated`` backend is the CUDA kernels on CPU tensors, on an emulator of the CUDA runtime.
    """

    name: str
    device: torch.device
    kernels: str

    def __str__(self) -> str:
        return self.name

    def rows(self) -> list[_capability.Capability]:
        return [row for row in _capability.table() if row.backend == self.kernels and row.operator in OPERATORS]

    def dtypes(self) -> list[torch.dtype]:
        """What all its operators take; the first serves tests that need but one."""
        return [getattr(torch, name) for name in self.rows()[0].dtypes]

    def missing(self, need: str) -> str | None:
        """Why a test that needs a feature or dtype of the table, or sm90, has nothing to run; None where it has."""
        if need == "sm90":
            return None if self._has_sm90() else "needs compute capability 9.0"
        if all(need in row.features or need in row.dtypes for row in self.rows()):
            return None
        return f"capability table: no {need} on {self.kernels}"

    def _has_sm90(self) -> bool:
        if self.kernels != "cuda":
            return False
        x = torch.empty(1, 1, 128, 64, dtype=torch.bfloat16, device=self.device)
        with attnx.cuda_mainloop("auto"):
            return "[sm90]" in str(attnx.explain(attnx.softmax_attention, x, x, x))


def _available() -> list[Backend]:
    if attnx._C.cuda_on_host:
        return [Backend("emulated", torch.device("cpu"), "cuda")]
    backends = [Backend("cpu", torch.device("cpu"), "cpu")]
    if torch.cuda.is_available() and attnx._C.build_info()["cuda"]:
        backends.append(Backend("cuda", torch.device("cuda"), "cuda"))
    return backends


BACKENDS = _available()
