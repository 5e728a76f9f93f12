"""The processes that share a sequence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor

from attnx import _arguments

GroupLike: TypeAlias = ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Group:
    """A process group, the number of its processes, and which of them this one is."""

    processes: ProcessGroup
    size: int
    rank: int

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.processes, rank % self.size)


def resolve(group: Any) -> Group:
    """The group that a user names, of which this process must be one.

    Raises:
        RuntimeError: there is no default group yet, or this is none, or this process is not of it.
    """
    expected = "None, a ProcessGroup or a DeviceMesh of one dimension"
    if not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed.init_process_group before, got no default group")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise RuntimeError(f"group: expected {expected}, got a DeviceMesh of {group.ndim}; take mesh[name] of it")
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError("group: expected one that this process is of, got one that it is not")
    if not isinstance(group, ProcessGroup):
        _arguments.refuse("group", expected, group)
    return Group(group, dist.get_world_size(group), dist.get_rank(group))


def expect_shards(**given: Any) -> None:
    """Checks that each is a tensor that holds the shard of this process, and nothing of those of others."""
    _arguments.tensors(**given)
    for name, x in given.items():
        if isinstance(x, DTensor):
            raise RuntimeError(f"{name}: expected the shard of this process, as x.to_local() gives it, got a DTensor")


class Transfer:
    """Every process sends tensors ``distance`` ranks on, and receives those of the one ``distance`` ranks before it.

    Nothing waits until :meth:`wait`, and tensors that are sent stay as they are until then.
    """

    def __init__(self, tensors: dict[str, Tensor], group: Group, distance: int) -> None:
        self._received = tensors
        self._works: list[dist.Work] = []
        if distance % group.size == 0:
            return
        self._sent = {name: x.contiguous() for name, x in tensors.items()}
        self._received = {name: torch.empty_like(x) for name, x in self._sent.items()}
        to, source = (group.global_rank(group.rank + way) for way in (distance, -distance))
        operations = []
        for name, sent in self._sent.items():
            if sent.numel():
                operations.append(dist.P2POp(dist.isend, sent, to, group.processes))
                operations.append(dist.P2POp(dist.irecv, self._received[name], source, group.processes))
        if operations:
            self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> dict[str, Tensor]:
        for work in self._works:
            work.wait()
        return self._received


def pass_around(held: dict[str, Tensor], group: Group, steps: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields what the process that many steps before this one holds, step by step, while the next one arrives."""
    for step in range(steps):
        coming = _pass_on(held, group, step, steps)
        yield step, held
        if coming is not None:
            held = coming.wait()


def pass_back(
    held: dict[str, Tensor],
    group: Group,
    steps: int,
    differentiate: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Returns the sum of what all processes give for the tensors of this one, as those go around once more.

    Args:
        held: the tensors of this process.
        group: the processes of the ring.
        steps: for how many steps they go around.
        differentiate: it takes the step and what is held in it, and returns this process's gradients of that.
    """
    arriving = None
    for step in range(steps):
        coming = _pass_on(held, group, step, steps)
        gradients = differentiate(step, held)
        if arriving is not None:
            for name, x in arriving.wait().items():
                gradients[name] += x
        # Gradients follow their tensors, and from where these went last they go home.
        arriving = Transfer(gradients, group, 1 if coming is not None else -step)
        if coming is not None:
            held = coming.wait()
    assert arriving is not None
    return arriving.wait()


def _pass_on(held: dict[str, Tensor], group: Group, step: int, steps: int) -> Transfer | None:
    """After the last step nobody needs what is held."""
    return Transfer(held, group, 1) if step + 1 < steps else None


def check_alike(name: str, x: Any, group: Group) -> None:
    """Under ``ATTNX_DEBUG=1`` processes tell each other what they have; otherwise nobody waits for that."""
    if os.environ.get("ATTNX_DEBUG") != "1":
        return
    of_all: list[Any] = [None] * group.size
    dist.all_gather_object(of_all, x, group=group.processes)
    for rank, other in enumerate(of_all):
        if other != x:
            raise RuntimeError(f"{name}: expected the same on all processes, got {x} here and {other} on rank {rank}")
