"""Which stage owns which blocks, and what stands in for the blocks of others."""

import copy
import functools
import pickle
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Binder
from xfuser.models.plan import ModelPlan, blocks_of

NOMINAL_TOKENS = {"image": 4096, "text": 512}  # of a 1024-pixel image; only their ratio matters


def stage_layers(model: nn.Module, plan: ModelPlan, stages: int, asked: tuple[int, ...] | None = None) -> list[int]:
    """Number of blocks of each stage: as asked for, else so that the slowest stage takes as little time as possible.

    Raises:
        ValueError: there are fewer blocks than stages, or the numbers asked for do not add up.
    """
    blocks = blocks_of(model, plan)
    if stages > len(blocks):
        raise ValueError(
            f"pipefusion_parallel_degree={stages} is more than the {len(blocks)} blocks of {type(model).__name__}: use"
            f" at most {len(blocks)}"
        )
    if asked is None:
        costs = [block_cost(block.module, plan) for block in blocks]
        costs[-1] += _linear_cost(model.get_submodule(plan.head), NOMINAL_TOKENS["image"]) if plan.head else 0
        return _balanced(costs, stages)
    if sum(asked) != len(blocks) or len(asked) != stages or min(asked) < 1:
        raise ValueError(
            f"attn_layer_num_for_pp={list(asked)} must be {stages} numbers of 1 or more that add up to the"
            f" {len(blocks)} blocks of {type(model).__name__}"
        )
    return list(asked)


def block_cost(block: nn.Module, plan: ModelPlan) -> float:
    """Multiplications of a block's forward on a 1024-pixel image, about: its linears, and its attention."""
    linears = {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear)}
    text = {name for name in linears if any(f"{name}.".startswith(f"{prefix}.") for prefix in plan.text_modules)}
    image_tokens = NOMINAL_TOKENS["image"] + (NOMINAL_TOKENS["text"] if plan.text and not text else 0)
    cost = 0.0
    for name, linear in linears.items():
        if not name.startswith("norm"):  # those work on one row
            cost += _linear_cost(linear, NOMINAL_TOKENS["text"] if name in text else image_tokens)
    for name, streams in plan.attentions().items():
        attention = getattr(block, name, None)
        if attention is not None:
            width = next(one.in_features for one in attention.modules() if isinstance(one, nn.Linear))
            cost += 2 * sum(NOMINAL_TOKENS[stream] for stream in streams.queries) ** 2 * width
    return cost


def _linear_cost(module: nn.Module, tokens: int) -> float:
    return sum(weight.numel() for weight in module.parameters()) * tokens


def _balanced(costs: list[float], parts: int) -> list[int]:
    """Sizes of consecutive parts, none empty, whose largest sum is the smallest possible."""
    sums = [0.0, *accumulate(costs)]

    @functools.cache
    def best(start: int, parts: int) -> tuple[float, tuple[int, ...]]:
        if parts == 1:
            return sums[-1] - sums[start], (len(costs) - start,)
        options = []
        for stop in range(start + 1, len(costs) - parts + 2):
            rest, sizes = best(stop, parts - 1)
            options.append((max(sums[stop] - sums[start], rest), (stop - start, *sizes)))
        return min(options)

    return list(best(0, parts)[1])


class Stub(nn.Module):
    """Stands in for a block of another stage: passes the streams on, and has the block's attributes.

    The block's weights are freed. Of its submodules only those lent to the forward keep theirs, and stay registered.

    Attributes:
        stage_layers: number of blocks of each stage, as the blocks were divided.
        held: whether a wrapped pipeline has it, and will give the block back.
    """

    def __init__(self, block: nn.Module, plan: ModelPlan, place: tuple[str, int], layers: list[int]) -> None:
        super().__init__()
        list_name, prefix = place[0], f"{place[0]}.{place[1]}."
        lent = [name.removeprefix(prefix) for name in plan.lent if name.startswith(prefix)]
        self.lent = nn.ModuleList(block.get_submodule(name) for name in lent)
        self.__dict__["block"] = block  # unregistered: its weights are gone
        self.stage_layers, self.held = layers, False
        for weight, owner, key in tensors_of(block, set(self.lent.parameters())):
            set_tensor(owner, key, weight, weight.to("meta"))
        names = {streams: name for name, streams in plan.carriers(list_name).items()}
        returned = [names[streams] for streams in plan.outputs(list_name)]
        bind = Binder(block.forward)

        @functools.wraps(block.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = bind(args, kwargs)
            passed = tuple(arguments[name] for name in returned)
            return passed if len(passed) > 1 else passed[0]

        self.forward = forward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


def divide(model: nn.Module, plan: ModelPlan, layers: list[int], stage: int) -> None:
    """Leave the blocks of this stage in the model, and put a :class:`Stub` in the place of each of the others."""
    owners = [owner for owner, count in enumerate(layers) for _ in range(count)]
    for (block, name, i), owner in zip(blocks_of(model, plan), owners, strict=True):
        if owner != stage:
            model.get_submodule(name)[i] = Stub(block, plan, (name, i), layers)


def divided(model: nn.Module, plan: ModelPlan) -> list[Stub]:
    """The stubs that are in the place of a model's blocks."""
    return [block.module for block in blocks_of(model, plan) if isinstance(block.module, Stub)]


class StageBlocks:
    """The blocks of a transformer that this stage holds. The weights of all others are freed until :meth:`restore`."""

    def __init__(self, model: nn.Module, plan: ModelPlan, group: GroupCoordinator, layers: list[int]) -> None:
        self._group = group
        self.owners = [stage for stage, count in enumerate(layers) for _ in range(count)]
        self._places = [(block.list_name, block.index) for block in blocks_of(model, plan)]
        self._model = model
        if not divided(model, plan):  # it is where the pipeline was loaded for these stages
            divide(model, plan, layers, group.rank_in_group)
        modules = [block.module for block in blocks_of(model, plan)]
        self._stubs = {index: block for index, block in enumerate(modules) if isinstance(block, Stub)}
        if set(self._stubs) != {index for index, owner in enumerate(self.owners) if owner != group.rank_in_group}:
            raise ValueError(
                f"this {type(model).__name__} was loaded for other degrees: wrap it with those, or load it again"
            )
        for stub in self._stubs.values():
            stub.held = True
        self.remember()

    def remember(self) -> None:
        """Take this stage's blocks, as they are now, for those that the other stages have a place for."""
        self._remembered = {place: _described(block) for place, block in self._own().items()}
        self._changed: set[tuple[str, int]] = set()

    def check(self) -> str | None:
        """Ahead of :meth:`restore`: why others could not take this stage's blocks as they are now; None if they can.

        Blocks whose weights are not those that were remembered, as after LoRA layers were loaded, travel as modules.
        """
        own = self._own() if self._stubs else {}
        changed = {place: block for place, block in own.items() if _described(block) != self._remembered[place]}
        for place, block in changed.items():
            kinds = {type(x) for x, *_ in tensors_of(block)} - {torch.Tensor, nn.Parameter}
            if kinds:
                return f"weights of the type {kinds.pop().__name__}"
            try:
                pickle.dumps(_without_weights(block))
            except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
                return f"{'.'.join(map(str, place))} cannot be pickled: {error}"
        self._changed = set(changed)
        return None

    def _own(self) -> dict[tuple[str, int], nn.Module]:
        places = [place for index, place in enumerate(self._places) if index not in self._stubs]
        return {(name, i): self._model.get_submodule(name)[i] for name, i in places}

    def restore(self) -> None:
        """Give every stage all blocks again, with the weights of the stage that holds them; all stages must call it."""
        for index, (name, i) in enumerate(self._places):
            stub = self._stubs.get(index)
            block = stub.block if stub else self._model.get_submodule(name)[i]
            # The wrapped pipeline may have been moved to another dtype, which stubs do not notice.
            dtypes = [weight.dtype for weight, *_ in tensors_of(block)]
            changed = _without_weights(block) if (name, i) in self._changed else None
            changed, dtypes = self._group.broadcast_object((changed, dtypes), src=self.owners[index])
            if stub and changed:
                block = changed
            for (weight, owner, key), dtype in zip(tensors_of(block), dtypes, strict=True):
                x = weight.detach()
                if weight.is_meta:
                    x = torch.empty_like(weight, dtype=dtype, device=self._group.device)
                x = self._group.broadcast(x, src=self.owners[index])
                if weight.is_meta:
                    set_tensor(owner, key, weight, x)
            if stub:
                self._model.get_submodule(name)[i] = block
        self._stubs = {}


def _described(block: nn.Module) -> list[tuple[str, torch.Size, type]]:
    """What must be the same for weights to be given from one module to another."""
    return [(key, x.shape, type(x)) for x, _, key in tensors_of(block)]


def _without_weights(block: nn.Module) -> nn.Module:
    """A copy whose weights are on the meta device."""
    memo = {}
    for x, owner, key in tensors_of(block):
        blank = x.detach().to("meta")
        memo[id(x)] = nn.Parameter(blank, x.requires_grad) if key in owner._parameters else blank
    return copy.deepcopy(block, memo)


def tensors_of(
    module: nn.Module, without: set[nn.Parameter] = frozenset()
) -> list[tuple[torch.Tensor, nn.Module, str]]:
    """All parameters and buffers of a module tree: the tensor, the module that has it, its name there."""
    return [
        (x, owner, key)
        for owner in module.modules()
        for key, x in (*owner._parameters.items(), *owner._buffers.items())
        if x is not None and x not in without
    ]


def set_tensor(owner: nn.Module, key: str, old: torch.Tensor, new: torch.Tensor) -> None:
    """Put a tensor in the place of a module's parameter or buffer."""
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        owner._buffers[key] = new
