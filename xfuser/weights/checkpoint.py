"""Read the weights in a folder's safetensors files: check their headers, and read each tensor once per node."""

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.models.registry import read_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

Part = tuple[int, tuple[range, ...]] | None  # a dimension, and its ranges to keep and concatenate; None for all


class Entry(NamedTuple):
    """A tensor in a file; its bytes begin at ``start``."""

    path: str
    start: int
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Read the tensor into newly allocated memory."""
        x = _blank(self.shape, self.dtype)
        if x.numel():
            with open(self.path, "rb") as file:  # not mapped: mapped pages would count as this process's memory
                file.seek(self.start)
                file.readinto(x.view(-1).view(torch.uint8).numpy())
        return x


def entries_of(path: str) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, read from its header. A truncated file raises a ValueError."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length or not length:
            raise ValueError(f"{path} is truncated, or not a safetensors file: it has {size} bytes. Fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({error}). Fetch it again") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        if info["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name!r} is of the dtype {info['dtype']!r}; known are {', '.join(DTYPES)}")
        start, end = (8 + length + offset for offset in info["data_offsets"])
        if end > size:
            raise ValueError(f"{path} is truncated: {name!r} ends at byte {end} of {size}. Fetch the file again")
        entries[name] = Entry(path, start, torch.Size(info["shape"]), DTYPES[info["dtype"]])
    return entries


def checkpoint(folder: str, stem: str, variant: str | None = None) -> dict[str, Entry] | None:
    """The tensors of ``{stem}.safetensors``, or of the files in its index; None if neither exists.

    The files of a variant, such as fp16, are preferred. A file that is missing or truncated, or lacks a tensor that
    the index assigns to it, raises a ValueError.
    """
    for ending in (f".{variant}", "") if variant else ("",):
        index = os.path.join(folder, f"{stem}.safetensors.index{ending}.json")
        if os.path.isfile(index):
            return _indexed(index)
        single = os.path.join(folder, f"{stem}{ending}.safetensors")
        if os.path.isfile(single):
            return entries_of(single)
    return None


def _indexed(index: str) -> dict[str, Entry]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map, which names the file of each tensor: fetch it again")
    held: dict[str, Entry] = {}
    for name in sorted(set(places.values())):
        path = os.path.join(os.path.dirname(index), name)
        keys = [key for key, one in places.items() if one == name]
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: {index} says that it holds {_named(keys)}")
        held |= entries_of(path)
    for key, name in places.items():
        if key not in held:
            raise ValueError(f"{os.path.join(os.path.dirname(index), name)} lacks {key!r}, which {index} names")
    return held


def checked(held: dict[str, Entry], expected: dict[str, Tensor], cls: type[nn.Module]) -> dict[str, Entry]:
    """A checkpoint for a state dict, without the unexpected tensors that the model's class ignores.

    A tensor that is missing, unexpected and not ignored, or of another shape raises a ValueError.
    """
    ignored, kind = getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or (), cls.__name__
    surplus = [name for name in held if name not in expected and not any(re.search(one, name) for one in ignored)]
    if missing := [name for name in expected if name not in held]:
        files = _named(sorted({entry.path for entry in held.values()}))
        raise ValueError(f"{files}: {kind} needs {_named(missing)}, missing there; use the checkpoint of its config")
    if surplus:
        problem = f"{held[surplus[0]].path}: {kind} has no place for {_named(surplus)}"
        raise ValueError(f"{problem}. After fuse_lora(), call unload_lora_weights() before saving")
    for name, x in expected.items():
        if held[name].shape != x.shape:
            shapes = f"the shape {list(held[name].shape)}, and {list(x.shape)} by the config of {kind}"
            raise ValueError(f"{held[name].path}: {name!r} has {shapes}")
    return {name: entry for name, entry in held.items() if name in expected}


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def node_group(world: GroupCoordinator, backend: str) -> GroupCoordinator:
    """The group of ranks on this machine; every rank of the world must call this."""
    hosts = world.all_gather_object(socket.gethostname())
    ranks = [[rank for rank, host in enumerate(hosts) if host == one] for one in dict.fromkeys(hosts)]
    return GroupCoordinator(ranks, world.local_rank, backend)


def read_shared(
    held: dict[str, Entry], kept: dict[str, Part], node: GroupCoordinator, cast: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors that the ranks of a node keep: one rank reads each tensor, and sends the others their parts.

    Args:
        held: the checkpoint, the same on every rank.
        kept: by name, the part of each tensor that this rank keeps; it does not keep tensors that are not named.
        node: the ranks that read together; every rank must exhaust the iterator.
        cast: converts a tensor, given its name, to the dtype and device in which it is sent and kept.

    A rank holds in memory only its own parts and the tensor that it is reading or receiving.
    """
    wanted = node.all_gather_object(kept)
    for number, (name, entry) in enumerate(held.items()):
        parts = {rank: names[name] for rank, names in enumerate(wanted) if name in names}
        if node.rank_in_group in parts:
            reader = list(parts)[number % len(parts)]
            yield name, _distributed(entry, parts, reader, node, partial(cast, name))


def _distributed(
    entry: Entry, parts: dict[int, Part], reader: int, node: GroupCoordinator, cast: Callable[..., Tensor]
) -> Tensor:
    """This rank's part of a tensor that ``reader`` reads; ``parts`` has the parts of all ranks that keep it."""
    rank = node.rank_in_group
    if len(parts) == node.world_size and not any(parts.values()):
        return node.broadcast(cast(entry.read() if rank == reader else _blank(entry.shape, entry.dtype)), reader)
    if rank != reader:
        x = cast(_blank(kept_of(entry.shape, parts[rank]), entry.dtype))
        node.irecv(x, reader).wait()
        return x
    x = cast(entry.read())
    sent = {one: _cut(x, part) for one, part in parts.items() if one != reader}  # kept alive until the sends finish
    for work in [node.isend(part, one) for one, part in sent.items()]:
        work.wait()
    return _cut(x, parts[rank])


def _blank(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor to receive into, on the CPU regardless of the default device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def kept_of(shape: torch.Size, part: Part) -> torch.Size:
    """The shape of a part of a tensor."""
    return _cut(torch.empty(shape, device="meta"), part).shape


def _cut(x: Tensor, part: Part) -> Tensor:
    """A copy of a part of a tensor: a view would keep the whole tensor in memory."""
    return x if part is None else torch.cat([x.narrow(part[0], one.start, len(one)) for one in part[1]], part[0])
