"""FSDP (arXiv 2304.11277): each rank holds a shard of the weights, which are gathered for each block's forward."""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.distributed.utils import share
from xfuser.core.hooks import replaced
from xfuser.methods.cache.added import cache_as
from xfuser.methods.refusals import refusal
from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.models.registry import original_of

Shape = tuple[torch.Size, torch.dtype]

FUSING = ("fuse_qkv_projections", "fuse_lora", "unfuse_lora")  # methods that need the full weights
_SHARDS = "_xfuser_shards"  # attribute of a copy that holds its Shards


def outermost_lists(module: nn.Module) -> list[nn.Module]:
    """The entries of a module's outermost ModuleLists, except None."""
    found: list[nn.Module] = []
    for child in module.children():
        found += child.children() if isinstance(child, nn.ModuleList) else outermost_lists(child)
    return found


def shapes_of(module: nn.Module) -> list[Shape]:
    """Shape and dtype of each of a module's parameters, in order."""
    return [(weight.shape, weight.dtype) for weight in module.parameters()]


def free_weights(module: nn.Module, device: torch.device) -> None:
    """Replace a module's parameters by empty ones of the same dtype on this device."""
    new: dict[int, nn.Parameter] = {}  # parameters that modules share stay shared
    for owner in module.modules():
        for key, old in owner._parameters.items():
            if old is not None:
                empty = nn.Parameter(torch.empty(0, dtype=old.dtype, device=device), old.requires_grad)
                owner._parameters[key] = new.setdefault(id(old), empty)


def is_freed(module: nn.Module) -> bool:
    """Whether a module's weights were freed by :func:`free_weights`, and not restored since."""
    weights = list(module.parameters())
    return bool(weights) and not any(weight.numel() for weight in weights)


def freed_by_wrap(module: nn.Module) -> str:
    """Why a module whose weights were freed cannot be used."""
    return (
        f"the weights of this {type(module).__name__} are divided over the ranks of a wrapped pipeline: call that"
        " pipeline, or unwrap() it first"
    )


class Shards:
    """A copy of a module (``copy``) in which each rank of a group holds some rows of the weights.

    The caller frees the weights of the module itself; :meth:`restore` puts them back.

    Args:
        module: its weights may be on the meta device, or freed.
        plan: the plan of a transformer, whose blocks are sharded; None for other modules, whose ModuleList entries are
            sharded. Every rank keeps all other weights in full, and also the weights of modules in ``plan.lent``,
            which are used outside their block.
        shapes: shapes and dtypes of the module's full parameters.

    Raises:
        ValueError: the module has Diffusers hooks.
    """

    def __init__(self, module: nn.Module, group: GroupCoordinator, plan: ModelPlan | None, shapes: list[Shape]) -> None:
        kind = type(module).__name__
        registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
        if any(registry is not None and registry.hooks for registry in registries):  # a call leaves empty registries
            raise ValueError(
                f"{kind} has Diffusers hooks, which cannot be copied: wrap the pipeline first, then add them"
            )
        self.module, self._group, self._guard = module, group, ExitStack()
        blank = [nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), False) for shape, dtype in shapes]
        self.copy = copy.deepcopy(module, dict(zip(map(id, module.parameters()), blank, strict=True)))
        blocks = [block.module for block in blocks_of(self.copy, plan)] if plan else []
        units, lent = blocks or outermost_lists(self.copy), plan.lent if plan else ()
        kept = {weight for name in lent for weight in self.copy.get_submodule(name).parameters()}
        sharded = {weight for unit in units for weight in unit.parameters()} - kept
        ignored = set(self.copy.parameters()) - sharded
        mesh = DeviceMesh.from_group(group.device_group, group.device.type)
        for unit in units:
            cls = type(unit)
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
            cache_as(type(unit), cls)
        fully_shard(self.copy, mesh=mesh, ignored_params=ignored)  # has no weights: the units share its streams
        self.copy.__dict__[_SHARDS] = self
        self.copy.forward = _outside_of_inference_mode(self.copy.forward)
        self.copy.forward.placement = "shard"
        for name in filter(lambda name: hasattr(module, name), FUSING):
            message = f"{name}: {kind} is sharded: call it on the full pipeline, before the wrap or after unwrap()"
            self.copy.__dict__[name] = refusal(message)
        self._shapes = self._shapes_now()

    @property
    def degree(self) -> int:
        """Number of ranks over which the weights are sharded."""
        return self._group.world_size

    def rows(self) -> dict[str, range | None]:
        """The rows of each parameter that this rank holds, by parameter name; None for all rows."""
        rank = self._group.rank_in_group
        parameters = self.copy.named_parameters()
        return {name: share(self._sizes(x), rank) if isinstance(x, DTensor) else None for name, x in parameters}

    def _sizes(self, x: DTensor) -> list[int]:
        """Number of rows that each rank holds: equal on all ranks except the last ones."""
        size = -(-len(x) // self.degree)
        return [max(0, min(size, len(x) - size * rank)) for rank in range(self.degree)]

    def fill(self, name: str, x: torch.Tensor) -> None:
        """Set the copy's rows of a parameter."""
        prefix, _, key = name.rpartition(".")
        old = self.copy.get_submodule(prefix)._parameters[key]
        if isinstance(old, DTensor):
            like = {"shape": old.shape, "stride": old.stride()}
            x = DTensor.from_local(x, old.device_mesh, old.placements, run_check=False, **like)
        new = nn.Parameter(x, requires_grad=False)
        for module in self.copy.modules():  # several modules may share the parameter
            for other, weight in module._parameters.items():
                if weight is old:
                    module._parameters[other] = new

    def _shapes_now(self) -> dict[str, torch.Size]:
        return {name: weight.shape for name, weight in self.copy.named_parameters()}

    def take(self, weights: Iterable[torch.Tensor]) -> None:
        """Keep this rank's rows of full weights, given one per parameter, and free the module's weights."""
        for (name, rows), x in zip(self.rows().items(), weights, strict=True):
            self.fill(name, x if rows is None else x[rows.start : rows.stop].clone())
        free_weights(self.module, self._group.device)
        refuse = refusal(freed_by_wrap(self.module))
        refuse.placement = "shard"
        self._guard.enter_context(replaced(self.module, "forward", refuse))

    def changes(self) -> list[str]:
        """Changes of the copy's parameters since it was made, with which the module cannot be restored."""
        kind, before, now = type(self.module).__name__, self._shapes, self._shapes_now()
        found = [f"{kind} has got {name!r}" for name, shape in now.items() if before.get(name) != shape]
        return found + [f"{kind} has lost {name!r}" for name in before if name not in now]

    @torch.no_grad()
    def restore(self) -> nn.Module:
        """The module with its full weights; all ranks of the group must call this, with memory for them."""
        for part in self.copy.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        self._guard.close()
        free_weights(self.module, self._group.device)
        for old, new in zip(self.module.parameters(), self.copy.parameters(), strict=True):
            if isinstance(new, DTensor):
                # Not new.full_tensor(): the state that it caches for equal meshes outlives their process groups.
                new = self._group.all_gather(new.to_local(), dim=0, sizes=self._sizes(new))
            old.data = new.data
        return self.module

    def put_back(self, pipe: Any, name: str) -> None:
        """Restore a pipeline's component of this name, unless it was replaced; all ranks must call this."""
        module, now = self.restore(), getattr(pipe, name)
        if isinstance(now, nn.Module) and original_of(now) is self.copy:
            vars(pipe)[name] = module  # without registering a component


def _outside_of_inference_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that leaves inference mode: tensors that FSDP makes in it could not be filled outside of it later."""

    @wraps(forward)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return forward(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return forward(*args, **kwargs)

    return outside


def shards_of(module: nn.Module) -> Shards | None:
    """The :class:`Shards` of a module that is a sharded copy; None for other modules."""
    return vars(module).get(_SHARDS)


def shard(module: nn.Module, plan: ModelPlan, group: GroupCoordinator) -> Shards:
    """Shard a transformer's blocks: each rank keeps its rows of the weights, and frees the rest."""
    shards = Shards(module, group, plan, shapes_of(module))
    shards.take(weight.detach().to(group.device) for weight in list(module.parameters()))
    return shards
