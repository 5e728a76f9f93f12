"""Tensors that change in place say so to autograd, which does not know it of operators from C++."""

from __future__ import annotations

from typing import Any

import torch

from attnx._operators.schema import LIBRARY, signature


def register(name: str) -> None:
    of = signature(name)

    def count(keys: Any, *args: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            of.operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
        torch.autograd.graph.increment_version([x for argument, x in of.bind(args).items() if argument in of.written])

    if of.written:
        LIBRARY.impl(name, count, "ADInplaceOrView", with_keyset=True)
