"""A process group from the view of one rank: its members, and the collectives over it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xfuser.core import device as devices
from xfuser.core.distributed.ending import end_group, new_group

DESTROYED = "a process group that has been destroyed"  # not None, which means all ranks


class GroupCoordinator:
    """One of the groups that partition the world, from the view of the calling rank.

    Every rank of the world must construct it with the same ``group_ranks`` (a list of lists of global ranks), in
    the same order relative to other coordinators. Ranks that its methods take or return (``src``, ``dst``)
    are ranks within the group unless they are called global.

    Attributes:
        rank, local_rank: global rank, and the rank within the node.
        ranks, world_size, rank_in_group: members (global ranks), their number, this rank's position among them.
        group_ranks: the members of all the groups.
        device_group: the ``torch.distributed`` process group.
        cpu_group: a group of the same members for data on the CPU: ``device_group`` itself if its backend supports
            that, otherwise a gloo group.
        device: the device of this rank's tensors.
    """

    def __init__(self, group_ranks: list[list[int]], local_rank: int, torch_distributed_backend: str) -> None:
        self.rank = dist.get_rank()
        self.local_rank = local_rank
        self.group_ranks = group_ranks
        self.device = devices.device(local_rank)
        self.ranks, self.device_group = own_group(group_ranks, torch_distributed_backend)
        self.cpu_group = self.device_group
        backend = dist.get_backend(self.device_group)
        if self.device.type != "cpu" and (devices.backend() in backend or backend == "undefined"):
            if backend == devices.backend():  # other names mean a backend per device, the CPU included
                _, self.cpu_group = own_group(group_ranks, "gloo")
            connect(self.device_group, self.device)
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)

    @property
    def first_rank(self) -> int:
        """Global rank of the group's first member."""
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        """Global rank of the group's last member."""
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the group's first."""
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        """Whether this rank is the group's last."""
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """Global rank of the member after this one, around the group."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the member before this one, around the group."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    def all_reduce(self, input_: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """Reduce ``input_`` over the group, in place if it is contiguous; returns the result."""
        if self.world_size == 1:
            return input_
        input_ = input_.contiguous()
        dist.all_reduce(input_, op=op, group=self.device_group)
        return input_

    def all_gather(
        self, input_: Tensor, dim: int = 0, separate_tensors: bool = False, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Gather ``input_`` from all members, in group order.

        Sizes may differ between members along ``dim`` only. A caller that knows these sizes can pass them as ``sizes``,
        which saves an exchange. Returns one tensor concatenated along ``dim``, or the list of parts.
        """
        x = input_.reshape(1) if input_.dim() == 0 else input_
        dim = dim % x.dim()
        if self.world_size == 1:
            return [x] if separate_tensors else x
        parts = all_gather_parts(x, dim, sizes or self._sizes_along(x, dim), self.device_group)
        return parts if separate_tensors else torch.cat(parts, dim=dim)

    def _sizes_along(self, x: Tensor, dim: int) -> list[int]:
        return [size for (size,) in gather_numbers([x.shape[dim]], self.cpu_group)]

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """All members' ``input_``, concatenated along ``dim`` (sizes may differ), on member ``dst``; None on others."""
        if self.world_size == 1:
            return input_
        dim = dim % input_.dim()
        sizes = self._sizes_along(input_, dim)
        x = _pad_rows(input_.movedim(dim, 0), max(sizes)).contiguous()
        parts = [torch.empty_like(x) for _ in sizes] if self.rank_in_group == dst else None
        dist.gather(x, parts, dst=self._global(dst), group=self.device_group)
        if parts is None:
            return None
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Member ``src``'s tensor, on all; others pass one of the same shape, which is overwritten if contiguous."""
        if self.world_size == 1:
            return input_
        input_ = input_.contiguous()
        dist.broadcast(input_, src=self._global(src), group=self.device_group)
        return input_

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        """Member ``src``'s picklable object, on every member."""
        return self.broadcast_object_list([obj], src)[0]

    def broadcast_object_list(self, obj_list: list[Any], src: int = 0) -> list[Any]:
        """Copy member ``src``'s list of picklable objects into every member's list, which must have the same length."""
        if self.world_size > 1:
            dist.broadcast_object_list(obj_list, src=self._global(src), group=self.cpu_group)
        return obj_list

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Each member's picklable object, in group order."""
        objects = [None] * self.world_size
        dist.all_gather_object(objects, obj, group=self.cpu_group)
        return objects

    def broadcast_tensor_dict(self, tensor_dict: dict[str, Any] | None = None, src: int = 0) -> dict[str, Any]:
        """Member ``src``'s dict on every member; values other than tensors are pickled."""
        if self.world_size == 1:
            return tensor_dict
        mine = self.rank_in_group == src
        described = self.broadcast_object(_described(tensor_dict) if mine else None, src)
        for name, value in described.items():
            if isinstance(value, Tensor):
                full = tensor_dict[name] if mine else torch.empty_like(value, device=self.device)
                described[name] = self.broadcast(full, src)
        return described

    def send_object(self, obj: Any, dst: int | None = None) -> None:
        """Send a picklable object to member ``dst`` (the next one by default)."""
        dist.send_object_list([obj], self._global(dst, self.next_rank), group=self.cpu_group)

    def recv_object(self, src: int | None = None) -> Any:
        """Receive an object from member ``src`` (the previous one by default)."""
        received = [None]
        dist.recv_object_list(received, self._global(src, self.prev_rank), group=self.cpu_group)
        return received[0]

    def send_tensor_dict(self, tensor_dict: dict[str, Any], dst: int | None = None) -> None:
        """Send a dict to member ``dst`` (the next one by default); values other than tensors are pickled."""
        self.send_object(_described(tensor_dict), dst)
        for value in tensor_dict.values():
            if isinstance(value, Tensor):
                self.send(value, dst)

    def recv_tensor_dict(self, src: int | None = None) -> dict[str, Any]:
        """Receive a dict from member ``src`` (the previous one by default)."""
        described = self.recv_object(src)
        for name, value in described.items():
            if isinstance(value, Tensor):
                described[name] = self.recv(value.shape, value.dtype, src)
        return described

    def send(self, x: Tensor, dst: int | None = None) -> None:
        """Send ``x`` to member ``dst`` (the next one by default); returns when ``x`` may be reused."""
        dist.send(x.contiguous(), self._global(dst, self.next_rank), group=self.device_group)

    def recv(self, size: torch.Size, dtype: torch.dtype, src: int | None = None) -> Tensor:
        """Receive a tensor of this shape from member ``src`` (the previous one by default)."""
        x = torch.empty(size, dtype=dtype, device=self.device)
        dist.recv(x, self._global(src, self.prev_rank), group=self.device_group)
        return x

    def isend(self, x: Tensor, dst: int | None = None) -> dist.Work:
        """Start sending contiguous ``x``. Keep ``x`` and the handle until ``wait()``, or gloo drops the send."""
        if not x.is_contiguous():
            raise ValueError("isend needs a contiguous tensor: its buffer must outlive the call")
        return dist.isend(x, self._global(dst, self.next_rank), group=self.device_group)

    def irecv(self, x: Tensor, src: int | None = None) -> dist.Work:
        """Start receiving into contiguous ``x``, which holds the data once the handle's ``wait()`` returns."""
        return dist.irecv(x, self._global(src, self.prev_rank), group=self.device_group)

    def all_to_all(self, inputs: list[Tensor]) -> list[Tensor]:
        """Send ``inputs[i]`` to member i; return what each member sent here.

        Shapes may differ; all tensors must have the same dtype and number of dimensions.
        """
        if self.world_size == 1:
            return list(inputs)
        shapes = torch.tensor([list(x.shape) for x in inputs], device=inputs[0].device)
        incoming = torch.empty_like(shapes)
        dist.all_to_all_single(incoming, shapes, group=self.device_group)
        received = [torch.Size(shape) for shape in incoming.tolist()]
        counts = [shape.numel() for shape in received]
        buffer = inputs[0].new_empty(sum(counts))
        dist.all_to_all_single(
            buffer,
            torch.cat([x.reshape(-1) for x in inputs]),
            counts,
            [x.numel() for x in inputs],
            group=self.device_group,
        )
        return [part.view(shape) for part, shape in zip(buffer.split(counts), received, strict=True)]

    def barrier(self) -> None:
        """Wait until every member has made this call."""
        dist.barrier(group=self.cpu_group)  # NCCL's uses a device, and may choose another rank's

    def destroy(self) -> None:
        """Release the process groups."""
        for name in ("cpu_group", "device_group"):
            self._end(name)

    def _end(self, name: str) -> None:
        end_group(getattr(self, name))
        setattr(self, name, DESTROYED)

    def _global(self, member: int | None, default: int | None = None) -> int | None:
        """The global rank of a member, or ``default`` for None; raises a ValueError for what is no member."""
        if member is not None and member not in range(self.world_size):
            raise ValueError(f"rank {member!r} of a group must be from 0 to {self.world_size - 1}")
        return default if member is None else self.ranks[member]


class SequenceParallelGroupCoordinator(GroupCoordinator):
    """The sequence-parallel group, the product of a Ulysses group and a ring group.

    Its rank r has Ulysses rank ``r % ulysses_world_size`` and ring rank ``r // ulysses_world_size``.
    """

    def __init__(
        self,
        group_ranks: list[list[int]],
        local_rank: int,
        torch_distributed_backend: str,
        ulysses_ranks: list[list[int]],
        ring_ranks: list[list[int]],
    ) -> None:
        super().__init__(group_ranks, local_rank, torch_distributed_backend)
        ulysses, self.ulysses_group = own_group(ulysses_ranks, torch_distributed_backend)
        ring, self.ring_group = own_group(ring_ranks, torch_distributed_backend)
        if self.cpu_group is not self.device_group:
            connect(self.ulysses_group, self.device)
            connect(self.ring_group, self.device)
        self.ulysses_world_size, self.ulysses_rank = len(ulysses), ulysses.index(self.rank)
        self.ring_world_size, self.ring_rank = len(ring), ring.index(self.rank)

    @property
    def ulysses_block(self) -> range:
        """Ranks of this group that are in the same Ulysses group as this rank."""
        start = self.ring_rank * self.ulysses_world_size
        return range(start, start + self.ulysses_world_size)

    def destroy(self) -> None:
        """Release the group, and its Ulysses and ring groups."""
        for name in ("ulysses_group", "ring_group"):
            self._end(name)
        super().destroy()


def all_gather_parts(x: Tensor, dim: int, sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Every member's ``x``, in group order; ``sizes`` are their lengths along ``dim``, which may differ."""
    # Parts are padded to the longest: gloo's all_gather supports equal shapes only.
    x = _pad_rows(x.movedim(dim, 0), max(sizes)).contiguous()
    parts = [torch.empty_like(x) for _ in sizes]
    if x.numel():
        dist.all_gather(parts, x, group=group)
    return [part[:size].movedim(0, dim) for part, size in zip(parts, sizes, strict=True)]


def gather_numbers(numbers: list[int], group: dist.ProcessGroup, device: torch.device | str = "cpu") -> list[list[int]]:
    """Every member's integers, equally many, in group order. The group's backend must support ``device``."""
    if group.size() == 1:
        return [numbers]
    mine = torch.tensor(numbers, device=device)
    return [part.tolist() for part in all_gather_parts(mine, 0, [len(numbers)] * group.size(), group)]


def gather_together(
    k: Tensor, v: Tensor, dim: int, sizes: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gather every member's ``k`` and ``v``, which may differ in their last dimension, along ``dim`` in one message."""
    both = torch.cat(all_gather_parts(torch.cat([k, v], dim=-1), dim, sizes, group), dim=dim)
    return both.split([k.shape[-1], v.shape[-1]], dim=-1)


def own_group(group_ranks: list[list[int]], backend: str) -> tuple[list[int], dist.ProcessGroup]:
    """Make a process group for each list of ranks; return the ranks and the group of the calling rank."""
    own = None
    for ranks in group_ranks:
        group = new_group(ranks, backend)
        if dist.get_rank() in ranks:
            own = ranks, group
    if own is None:
        raise ValueError(f"rank {dist.get_rank()} is in none of the groups {group_ranks}")
    return own


def connect(group: dist.ProcessGroup, device: torch.device) -> None:
    """Run one collective over a new accelerator group. NCCL creates the communicator in the group's first operation if
    the group is not bound to a device, and that operation might otherwise involve only some of the members."""
    if group.size() > 1:
        dist.all_reduce(torch.zeros(1, device=device), group=group)


def _described(tensor_dict: dict[str, Any]) -> dict[str, Any]:
    """The dict with tensors on the meta device, which have shapes and dtypes only."""
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
        for name, x in tensor_dict.items()
    }


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])
