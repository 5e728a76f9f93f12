"""Which CUDA mainloop serves calls, where a device has a choice: to compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from attnx import _C


@contextmanager
def cuda_mainloop(name: Literal["auto", "sm80", "sm90", "decode"]) -> Iterator[None]:
    """Calls inside the block run on this CUDA mainloop, in all threads of the process, backwards included.

    The environment variable ``ATTNX_CUDA_MAINLOOP`` asks for one outside such blocks. Forward and backward have a
    choice.

    Args:
        name: ``"auto"``, the fastest that the device and the call allow (:func:`attnx.explain` names it); ``"sm80"``,
            the one for every device since compute capability 8.0; ``"sm90"``, the one for 9.0 (Hopper); ``"decode"``,
            that of few rows over a staircase cache. A call that it does not serve raises ``RuntimeError`` with the
            reason.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: attnx was built without CUDA kernels.
    """
    if _C.build_info()["cuda"] is None:
        raise RuntimeError("cuda_mainloop: expected a build with CUDA kernels, got one without")
    before = _C.cuda_mainloop()
    _C.set_cuda_mainloop(name)
    try:
        yield
    finally:
        _C.set_cuda_mainloop(before)
