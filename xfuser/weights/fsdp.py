"""Weights of which each rank holds a share, gathered for the time of a block's forward: FSDP (arXiv 2304.11277)."""

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from xfuser.core.distributed import GroupCoordinator
from xfuser.methods.refusals import refusal
from xfuser.models.plan import ModelPlan, blocks_of

Shape = tuple[torch.Size, torch.dtype]

FUSING = ("fuse_qkv_projections", "fuse_lora", "unfuse_lora")  # methods that make whole weights of weights
_SHARES = "_xfuser_shares"  # where a copy keeps what it is a copy of


def outermost_lists(module: nn.Module) -> list[nn.Module]:
    """The entries of a module's ModuleLists, without those within them, and those that are None."""
    found: list[nn.Module] = []
    for child in module.children():
        found += child.children() if isinstance(child, nn.ModuleList) else outermost_lists(child)
    return found


def shapes_of(module: nn.Module) -> list[Shape]:
    """Shape and dtype of a module's parameters, in their order."""
    return [(weight.shape, weight.dtype) for weight in module.parameters()]


def free_weights(module: nn.Module, device: torch.device) -> None:
    """Let a module's parameters hold nothing: they keep their dtype, and are on this device."""
    new: dict[int, nn.Parameter] = {}  # one that several modules share stays shared
    for owner in module.modules():
        for key, old in owner._parameters.items():
            if old is not None:
                empty = nn.Parameter(torch.empty(0, dtype=old.dtype, device=device), old.requires_grad)
                owner._parameters[key] = new.setdefault(id(old), empty)


def is_freed(module: nn.Module) -> bool:
    """Whether :func:`free_weights` was called on a module, and it has no weights since."""
    return all(not weight.numel() for weight in module.parameters())


class Shares:
    """A copy of a module (``copy``) in which each rank of a group holds some rows of the weights.

    The module itself is for the caller to leave without weights; :meth:`restore` gives it them back.

    Args:
        module: its weights may be on the meta device, or freed.
        units: modules within the one given to it, whose weights are gathered at a time. All other weights stay whole
            on every rank, as do those of the modules called ``lent``, which work outside of their unit.
        shapes: of the module's parameters when they are whole.

    Raises:
        ValueError: the module has hooks of Diffusers.
    """

    def __init__(
        self,
        module: nn.Module,
        units: Callable[[nn.Module], list[nn.Module]],
        shapes: list[Shape],
        group: GroupCoordinator,
        lent: tuple[str, ...] = (),
    ) -> None:
        registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
        if any(registry is not None and registry.hooks for registry in registries):  # a call leaves empty ones behind
            raise ValueError(
                f"{type(module).__name__} has hooks of Diffusers, such as group offloading's, which cannot be copied:"
                " wrap the pipeline first, then call what adds them"
            )
        self.module, self._group = module, group
        blank = [nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), False) for shape, dtype in shapes]
        memo = {id(weight): new for weight, new in zip(module.parameters(), blank, strict=True)}
        self.copy = copy.deepcopy(module, memo)
        inside = units(self.copy)
        whole = {weight for name in lent for weight in self.copy.get_submodule(name).parameters()}
        shared = {weight for unit in inside for weight in unit.parameters()} - whole
        ignored = set(self.copy.parameters()) - shared
        mesh = DeviceMesh.from_group(group.device_group, group.device.type)
        for unit in inside:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        fully_shard(self.copy, mesh=mesh, ignored_params=ignored)  # has no weights: the units share its streams
        self.copy.__dict__[_SHARES] = self
        for name in FUSING:
            if hasattr(module, name):
                self.copy.__dict__[name] = refusal(
                    f"{name}: the weights of {type(module).__name__} are in shares (fully_shard_degree), and cannot be"
                    " fused then: call it before the wrap of a pipeline that was loaded whole, or call unwrap(), do it,"
                    " and wrap the pipeline again"
                )
        self._shapes = self._shapes_now()

    @property
    def degree(self) -> int:
        """Number of ranks that share the weights."""
        return self._group.world_size

    def rows(self) -> dict[str, range | None]:
        """Name of each parameter, to the rows of it that this rank holds; None for all."""
        return {name: self._rows(x) if isinstance(x, DTensor) else None for name, x in self.copy.named_parameters()}

    def _rows(self, x: DTensor) -> range:
        starts = self._starts(x)
        return range(*starts[self._group.rank_in_group :][:2])

    def _starts(self, x: DTensor) -> list[int]:
        """The first row of each rank, and the number of all."""
        size = -(-len(x) // self._group.world_size)
        return [min(size * rank, len(x)) for rank in range(self._group.world_size + 1)]

    def _whole(self, x: DTensor) -> torch.Tensor:
        # Not x.full_tensor(): what it keeps of equal meshes outlives their process groups.
        sizes = [stop - start for start, stop in pairwise(self._starts(x))]
        return self._group.all_gather(x.to_local(), dim=0, sizes=sizes)

    def fill(self, name: str, x: torch.Tensor) -> None:
        """Give the copy its rows of a parameter."""
        prefix, _, key = name.rpartition(".")
        owner = self.copy.get_submodule(prefix)
        old = owner._parameters[key]
        if isinstance(old, DTensor):
            x = DTensor.from_local(
                x, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
            )
        new = nn.Parameter(x, requires_grad=False)
        for module in self.copy.modules():  # one that several modules share stays shared
            for other, weight in module._parameters.items():
                if weight is old:
                    module._parameters[other] = new

    def _shapes_now(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.copy.named_parameters()}

    def changes(self) -> list[str]:
        """In what the copy's parameters are others than those of the module, which cannot take them then."""
        now, owner = self._shapes_now(), type(self.module).__name__
        told = [f"{owner} has got {name!r}" for name in now if name not in self._shapes]
        told += [f"{owner} has lost {name!r}" for name in self._shapes if name not in now]
        both = [name for name in now if name in self._shapes]
        return told + [f"{owner} has got another shape of {name!r}" for name in both if now[name] != self._shapes[name]]

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """The module, with whole weights again; all ranks of the group must call it, and have the memory."""
        for part in self.copy.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        free_weights(self.module, self._group.device)
        for old, new in zip(self.module.parameters(), self.copy.parameters(), strict=True):
            old.data = self._whole(new) if isinstance(new, DTensor) else new.data
        return self.module


def shares_of(module: nn.Module) -> Shares | None:
    """What a module is the sharded copy of, if it is one."""
    return vars(module).get(_SHARES)


def blocks_in_shares(module: nn.Module, plan: ModelPlan, group: GroupCoordinator) -> Shares:
    """A transformer's blocks in shares, to be filled."""

    def units(model: nn.Module) -> list[nn.Module]:
        return [block.module for block in blocks_of(model, plan)] or outermost_lists(model)

    return Shares(module, units, shapes_of(module), group, plan.lent)


def shared_out(module: nn.Module, plan: ModelPlan, group: GroupCoordinator) -> Shares:
    """A transformer's blocks in shares; each rank keeps its own of the weights that it has, and frees the others."""
    shares = blocks_in_shares(module, plan, group)
    for (name, rows), weight in zip(shares.rows().items(), list(module.parameters()), strict=True):
        x = weight.detach().to(group.device)
        shares.fill(name, x if rows is None else x[rows.start : rows.stop].clone())
    free_weights(module, group.device)
    return shares
