"""One call of an operator, after another one of the same shape, for a profiler. ``python bench/one_call.py --help``

Profilers that wait for cudaProfilerStart see the second call alone.
"""

from __future__ import annotations

import argparse
import contextlib

import torch

import attnx
from device import open_device
from suite import DTYPES, Case


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("operator", choices=("sigmoid_attention", "softmax_attention"))
    for name, default in (("batch", 4), ("heads", 16), ("length", 4096), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--queries", type=int, help="(default: as many as --length, the number of keys)")
    parser.add_argument("--kv-heads", type=int, help="(default: as many as --heads)")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backward", action="store_true", help="profile the backward, not the forward")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N (default: %(default)s)")
    a = parser.parse_args()
    try:
        case = Case(
            "one",
            a.heads,
            a.queries or a.length,
            a.length,
            a.head_dim,
            a.batch,
            a.kv_heads,
            a.causal,
            heads_inside=True,
        )
        device = open_device(a.device).torch_device
    except ValueError as error:
        parser.error(str(error))

    inputs = [x.requires_grad_(a.backward) for x in case.inputs(DTYPES[a.dtype], device)]
    attention = getattr(attnx, a.operator)
    for profiled in (False, True):
        on_gpu = profiled and device.type == "cuda"
        watch = torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext()
        if not a.backward:
            with watch:
                attention(*inputs, is_causal=a.causal)
        else:
            output = attention(*inputs, is_causal=a.causal)
            with watch:
                torch.autograd.grad(output, inputs, torch.ones_like(output))


if __name__ == "__main__":
    main()
