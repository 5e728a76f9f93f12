"""A context in which models that know of no shards work on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from attnx import _arguments, _shards
from attnx.distributed import _group, sequence
from attnx.distributed.ring import ring_sigmoid_attention, ring_softmax_attention
from attnx.distributed.sequence import Layout

__all__ = ["context_parallel"]


@contextmanager
def context_parallel(
    mesh: DeviceMesh,
    *,
    buffers: list[Tensor],
    buffer_seq_dims: list[int],
    no_restore_buffers: set[Tensor] | None = None,
) -> Iterator[None]:
    """``torch.distributed.tensor.experimental.context_parallel``, in which attnx's attention works as well.

    Within it :func:`attnx.softmax_attention` and :func:`attnx.sigmoid_attention`, and the modules over them, are
    :func:`ring_softmax_attention` and :func:`ring_sigmoid_attention` over the processes of the mesh. They refuse the
    arguments that these do not have, and all other functions of attnx refuse the context, this one and torch's. The
    backward belongs within the context, too, where it recomputes activations.

    Args:
        mesh: of one dimension: the processes that share sequences.
        buffers: the whole sequences, which every process has, as tokens, labels and positions. Within the context
            each holds the shard of this process, in place. All are of one length.
        buffer_seq_dims: for each, the dimension that counts tokens.
        no_restore_buffers: those that need not be whole again afterwards.

    What depends on the places of tokens, as rotary embeddings do, takes them from a buffer, or from
    :func:`sequence_positions`. torch decides on the layout: by default it is ``"zigzag"``, and twice the number of
    processes divides the length.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
        ValueError: it does not fit torch's context.
        NotImplementedError: this torch has no such context.
    """
    try:
        from torch.distributed.tensor.experimental import context_parallel as context_of_torch
    except ImportError as error:
        raise NotImplementedError(
            "context_parallel: expected a torch that has torch.distributed.tensor.experimental.context_parallel, got "
            f"{torch.__version__}"
        ) from error
    if not isinstance(mesh, DeviceMesh):
        _arguments.refuse("mesh", "a DeviceMesh of one dimension", mesh)
    processes = _group.resolve(mesh)
    if not buffers or len(buffers) != len(buffer_seq_dims):
        raise RuntimeError(
            f"buffer_seq_dims: expected one for each of at least one buffer, got {len(buffer_seq_dims)} for "
            f"{len(buffers)}"
        )
    lengths = {x.shape[dim] for x, dim in zip(buffers, buffer_seq_dims, strict=True)}
    if len(lengths) > 1:
        raise RuntimeError(f"buffers: expected sequences of one length, got {sorted(lengths)}")
    # One more buffer tells how torch cuts them.
    places = torch.arange(next(iter(lengths)), device=buffers[0].device)
    whole = places.clone()
    with context_of_torch(
        mesh,
        buffers=[*buffers, places],
        buffer_seq_dims=[*buffer_seq_dims, 0],
        no_restore_buffers=no_restore_buffers,
    ):
        shares: dict[Layout, Tensor] = {
            layout: sequence.positions(len(whole), processes.rank, processes.size, layout, places.device)
            for layout in get_args(Layout)
            if len(whole) % (processes.size * len(sequence.chunks_of(layout, 0, processes.size))) == 0
        }
        layouts = [layout for layout, rows in shares.items() if torch.equal(rows, places)]
        if not layouts:
            raise RuntimeError(f"buffers: expected shards in a layout of {get_args(Layout)}, got another of torch's")
        rings = {
            "softmax_attention": partial(ring_softmax_attention, group=mesh, layout=layouts[0]),
            "sigmoid_attention": partial(ring_sigmoid_attention, group=mesh, layout=layouts[0]),
        }
        with _shards.shared_by(rings):
            yield
