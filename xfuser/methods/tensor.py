"""Tensor parallelism of a pipeline's models: each layer's weights are divided over the ranks (arXiv 1909.08053)."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, edited_arguments, replaced
from xfuser.core.tensor_parallel.division import Division
from xfuser.core.tensor_parallel.layers import Divided
from xfuser.core.tensor_parallel.shards import Shards
from xfuser.core.tensor_parallel.structure import describe
from xfuser.methods.adapters import LOADING, DividedAdapters
from xfuser.models.plan import ModelPlan, matching


def division_of(model: nn.Module, plan: ModelPlan | None, ranks: int, scheme: str | None = None) -> Division:
    """The division of a model with this plan over ``ranks``; its weights may be on the meta device.

    Raises:
        ValueError: the model has fewer heads than ranks, or a layer whose forward is not its class's.
    """
    if plan is None:
        return describe(model, ranks, scheme)
    unpaired = {name for pattern in plan.unpaired for name in matching(model, pattern)}
    for pattern, layer in plan.unpaired_without.items():
        lacking = [one for one in matching(model, pattern) if getattr(model.get_submodule(one), layer, None) is None]
        unpaired.update(lacking)
    return describe(model, ranks, scheme, plan.undivided, unpaired)


def divide(model: nn.Module, plan: ModelPlan | None, group: GroupCoordinator, scheme: str | None = None) -> Division:
    """Divide a model in place, and return its division; a :class:`TensorParallel` of that scheme accepts the model.

    This is for loaders: a model on the meta device shrinks to this rank's shards, and ``Division.kept`` returns their
    ranges.
    """
    division = division_of(model, plan, group.world_size, scheme)
    restore = division.apply(model, group)
    model.__dict__[_APPLIED] = _Applied(division, group.world_size, scheme, set(model.modules()), restore)
    return division


def refuse_divided(model: nn.Module, ranks: int = 1, scheme: str | None = None) -> bool:
    """Whether :func:`divide` has divided a model for this number of ranks and by this scheme.

    Raises:
        ValueError: the model is divided in another way, or by a wrap that still exists.
    """
    applied = vars(model).get(_APPLIED)
    if applied and (applied.ranks, applied.scheme) == (ranks, scheme):
        return True
    if applied or any(isinstance(module, Divided) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is divided over ranks already: call unwrap() on the wrap that did it, or wrap it"
            " with the tensor_parallel_degree and split_scheme that it was loaded with"
        )
    return False


class _Applied(NamedTuple):
    """The division of a model, the modules that it had then, and a function that undoes it."""

    division: Division
    ranks: int
    scheme: str | None
    modules: set[nn.Module]
    restore: Callable[[], None]


_APPLIED = "_xfuser_division"


class TensorParallel:
    """Divides models over a group until :meth:`restore`.

    Args:
        models: the models with their plans; None for models without one, such as text encoders.
        pipe: their pipeline; adapters that it loads into them are divided as well.
    """

    def __init__(
        self,
        models: list[tuple[nn.Module, ModelPlan | None]],
        group: GroupCoordinator,
        scheme: str | None = None,
        pipe: Any = None,
    ) -> None:
        self._rank = group.rank_in_group
        self._hooks = ExitStack()
        self._applied: dict[nn.Module, _Applied] = {}
        self._adapters: dict[nn.Module, DividedAdapters] = {}
        self._group, self._is_loading = group, False
        for model, plan in models:
            if not refuse_divided(model, group.world_size, scheme):
                divide(model, plan, group, scheme)
            self._applied[model] = applied = model.__dict__.pop(_APPLIED)
            for name, heads in applied.division.heads.items() if plan and plan.per_head else ():
                edit = partial(self._cut_tables, plan.per_head, heads)
                self._hooks.enter_context(edited_arguments(model.get_submodule(name), edit))
            self._adapters[model] = DividedAdapters(model, applied.division, group)
        for owner in (pipe, *self._applied):
            for name in filter(partial(hasattr, owner), LOADING):
                self._hooks.enter_context(replaced(owner, name, self._loading(getattr(owner, name))))

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """A loader of adapters that must run on all ranks, and leaves each rank its shard of them."""

        @wraps(load)
        def loading(*args: Any, **kwargs: Any) -> Any:
            if self._is_loading:
                return load(*args, **kwargs)
            self._is_loading = True
            try:
                with ExitStack() as stack:
                    for adapters in self._adapters.values():
                        stack.enter_context(adapters.loading())
                    return load(*args, **kwargs)
            finally:
                self._is_loading = False
                for model, applied in self._applied.items():
                    applied.modules.update(model.modules())

        return loading

    def changes(self) -> list[str]:
        """Modules with weights that were added since and are not divided; all ranks must call it."""
        divided = self._group.all_gather_object([adapters.divided for adapters in self._adapters.values()])
        if any(others != divided[0] for others in divided):
            return ["some ranks have adapters that others lack"]
        known = set().union(*(applied.modules for applied in self._applied.values()))
        return [
            f"{type(model).__name__} has got {name!r}"
            for model in self._applied
            for name, module in model.named_modules()
            if module not in known and list(module.parameters(recurse=False))
        ]

    def restore(self) -> None:
        """Restore the full weights on every rank; all ranks of the group must call it, and have the memory."""
        self._hooks.close()
        for adapters in self._adapters.values():
            adapters.restore()
        for applied in self._applied.values():
            applied.restore()
        self._applied, self._adapters = {}, {}

    def _cut_tables(self, tables: dict[str, dict[int, int]], heads: Shards, arguments: Arguments) -> None:
        """Cut tables with an entry for each head or channel to this rank's heads."""

        def own(dims: dict[int, int], x: Tensor) -> Tensor:
            dim = dims.get(x.dim())
            if dim is None or x.shape[dim] == 1:
                return x
            return heads.times(x.shape[dim] // heads.total).part(x, dim, self._rank)

        for name, dims in tables.items():
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(Tensor, partial(own, dims), arguments[name])
