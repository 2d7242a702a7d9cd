"""Assignment of blocks to stages, and the stubs that replace blocks of other stages."""

import copy
import functools
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, Binder, by_name, replaced
from xfuser.models.plan import Block, ModelPlan, blocks_of

NOMINAL_TOKENS = {"image": 4096, "text": 512}  # of a 1024-pixel image; only their ratio matters


def stage_layers(model: nn.Module, plan: ModelPlan, stages: int, asked: tuple[int, ...] | None = None) -> list[int]:
    """Number of blocks of each stage: as requested, otherwise balanced for the shortest time of the slowest stage.

    Raises:
        ValueError: there are fewer blocks than stages, or the requested numbers do not add up.
    """
    places = _places(model, plan)
    total = max(places) + 1
    those = f"the {total} blocks of {type(model).__name__}"
    if stages > total:
        raise ValueError(f"pipefusion_parallel_degree={stages} is more than {those}: use at most {total}")
    if asked is None:
        costs = [0.0] * total
        for place, block in zip(places, blocks_of(model, plan), strict=True):
            costs[place] += block_cost(block.module, plan)
        costs[-1] += _linear_cost(model.get_submodule(plan.head), NOMINAL_TOKENS["image"]) if plan.head else 0
        return list(_balanced(tuple(costs), stages)[1])
    if sum(asked) != total or len(asked) != stages or min(asked) < 1:
        raise ValueError(
            f"attn_layer_num_for_pp={list(asked)} must be {stages} numbers of 1 or more that add up to {those}"
        )
    return list(asked)


def block_cost(block: nn.Module, plan: ModelPlan) -> float:
    """Approximate multiplications of a block's forward on a 1024-pixel image, in its linears and its attention."""
    linears = {name: one for name, one in block.named_modules() if isinstance(one, nn.Linear)}
    prefixes = tuple(f"{name}." for name in plan.text_modules)
    text = {name for name in linears if f"{name}.".startswith(prefixes)}
    image_tokens = NOMINAL_TOKENS["image"] + (NOMINAL_TOKENS["text"] if plan.text and not text else 0)
    cost = 0.0
    for name, linear in linears.items():
        if not name.startswith("norm"):  # these work on one token
            cost += _linear_cost(linear, NOMINAL_TOKENS["text"] if name in text else image_tokens)
    for name, streams in plan.attentions().items():
        attention = getattr(block, name, None)
        if attention is not None:
            width = next(one.in_features for one in attention.modules() if isinstance(one, nn.Linear))
            cost += 2 * sum(NOMINAL_TOKENS[stream] for stream in streams.queries) ** 2 * width
    return cost


def _linear_cost(module: nn.Module, tokens: int) -> float:
    return sum(weight.numel() for weight in module.parameters()) * tokens


@functools.cache
def _balanced(costs: tuple[float, ...], parts: int) -> tuple[float, list[int]]:
    """Divide costs into consecutive, non-empty parts: the smallest possible largest sum, and the sizes of the parts."""
    if parts == 1:
        return sum(costs), [len(costs)]
    rests = [(size, *_balanced(costs[size:], parts - 1)) for size in range(1, len(costs) - parts + 2)]
    return min((max(sum(costs[:size]), rest), [size, *sizes]) for size, rest, sizes in rests)


class Stub(nn.Module):
    """Replaces a block of another stage: passes the streams on and has the block's attributes.

    The block's weights are freed. Only submodules that the forward uses directly (``plan.lent``) keep theirs and stay
    registered.

    Attributes:
        stage_layers: number of blocks of each stage when the stub was made.
        held: whether a wrapped pipeline has the stub, and will restore the block.
        passes: whether a wrapped call runs; outside of one, the forward would skip the block, and raises an error.
    """

    passes = False

    def __init__(self, block: nn.Module, plan: ModelPlan, place: tuple[str, int], layers: list[int]) -> None:
        super().__init__()
        prefix = f"{place[0]}.{place[1]}."
        lent = [name.removeprefix(prefix) for name in plan.lent if name.startswith(prefix)]
        self.lent = nn.ModuleList(block.get_submodule(name) for name in lent)
        self.__dict__["original"] = block  # not registered: its weights are freed
        self.stage_layers, self.held = layers, False
        self.free()
        names = {streams: name for name, streams in plan.carriers(place[0]).items()}
        returned = [names[streams] for streams in plan.outputs(place[0])]
        passed = itemgetter(*returned)

        def forward(arguments: dict[str, Any]) -> Any:
            if not self.passes:
                raise RuntimeError(
                    f"{place[0]}.{place[1]}, a {type(block).__name__}, is on another PipeFusion stage: call the wrapped"
                    " pipeline, run its transformer within active(), or call unwrap() first"
                )
            return passed(arguments)

        self.forward = by_name(block.forward, forward)

    def free(self) -> None:
        """Free the block's weights, except those that are lent."""
        kept = set(self.lent.parameters())
        for weight, owner, key in tensors_of(self.original):
            if weight not in kept:
                set_tensor(owner, key, weight, weight.to("meta"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


def divide(model: nn.Module, plan: ModelPlan, layers: list[int], stage: int) -> None:
    """Keep the blocks of this stage in the model, and replace each of the others with a :class:`Stub`."""
    for (block, name, i), owner in zip(blocks_of(model, plan), owners_of(model, plan, layers), strict=True):
        if owner != stage:
            model.get_submodule(name)[i] = Stub(block, plan, (name, i), layers)


def divided(model: nn.Module, plan: ModelPlan) -> list[Stub]:
    """The stubs that replace blocks of a model."""
    return [block.module for block in blocks_of(model, plan) if isinstance(block.module, Stub)]


class Chain(NamedTuple):
    """Blocks that pass tokens to each other, and their stages; ``kind`` names the messages with these tokens."""

    kind: str
    blocks: list[Block]
    owners: list[int]


class StageBlocks:
    """The blocks of a transformer that this stage holds. The weights of all others are freed until :meth:`restore`.

    Attributes:
        model, plan: the transformer and its plan.
        last: the stage of the last block.
        group: the ranks of the stages.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, group: GroupCoordinator, layers: list[int]) -> None:
        self.model, self.plan, self.group = model, plan, group
        self._owners, self.last = owners_of(model, plan, layers), len(layers) - 1
        if not divided(model, plan):  # it is divided if the pipeline was loaded for these stages
            divide(model, plan, layers, group.rank_in_group)
        stubs = [isinstance(block.module, Stub) for block in blocks_of(model, plan)]
        if stubs != [owner != group.rank_in_group for owner in self._owners]:
            raise ValueError(
                f"this {type(model).__name__} was loaded for other degrees: wrap it with those, or load it again"
            )
        for stub in divided(model, plan):
            stub.held = True
        self._hooks = ExitStack()
        if hasattr(model, "load_lora_adapter"):
            self._hooks.enter_context(replaced(model, "load_lora_adapter", self._loading(model.load_lora_adapter)))

    @property
    def chains(self) -> list[Chain]:
        """The chains of blocks: one for each list of hints, and one for all other blocks."""

        def kind(one: tuple[Block, int]) -> str:
            return one[0].list_name if one[0].list_name in self.plan.hints else "tokens"

        pairs = zip(blocks_of(self.model, self.plan), self._owners, strict=True)
        return [Chain(name, *map(list, zip(*ones, strict=True))) for name, ones in groupby(pairs, kind)]

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a loader of adapters: on a hot swap it gets only this stage's weights, as PEFT refuses the others."""
        first = Binder(load).names[0]

        def loading(arguments: Arguments) -> Any:
            weights = arguments[first]
            if arguments.get("hotswap") and isinstance(weights, dict):
                blocks = blocks_of(self.model, self.plan)
                others = [f".{name}.{i}." for block, name, i in blocks if isinstance(block, Stub)]
                own = {key: x for key, x in weights.items() if not any(other in f".{key}" for other in others)}
                arguments[first] = own
            return load(**arguments)

        return by_name(load, loading)

    def with_all_blocks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let ``function`` see all blocks in the model; weights that it gives to blocks of other stages are freed."""

        @functools.wraps(function)
        def seeing_all(*args: Any, **kwargs: Any) -> Any:
            stubs = [one for one in blocks_of(self.model, self.plan) if isinstance(one.module, Stub)]
            for stub, name, i in stubs:
                self.model.get_submodule(name)[i] = stub.original
            try:
                return function(*args, **kwargs)
            finally:
                for stub, name, i in stubs:
                    self.model.get_submodule(name)[i] = stub
                    stub.free()

        return seeing_all

    def remember(self) -> None:
        """Record names, shapes and types of the weights in this stage's blocks after the wrap, for :meth:`check`."""
        self._remembered = {(name, i): _described(block) for block, name, i in self._own()}
        self._changed: set[tuple[str, int]] = set()

    def check(self) -> str | None:
        """Return why other stages cannot take this stage's blocks, or None; must be called before :meth:`restore`.

        Blocks whose weights differ from the recorded ones, as after LoRA layers were loaded, are sent as modules.
        """
        own = self._own() if divided(self.model, self.plan) else []
        changed = [one for one in own if _described(one.module) != self._remembered[one.list_name, one.index]]
        for block, name, i in changed:
            kinds = {type(x) for x, *_ in tensors_of(block)} - {Tensor, nn.Parameter}
            if kinds:
                return f"weights of the type {kinds.pop().__name__}"
            try:
                pickle.dumps(_without_weights(block))
            except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
                return f"{name}.{i} cannot be pickled: {error}"
        self._changed = {(name, i) for _, name, i in changed}
        return None

    def _own(self) -> list[Block]:
        return [block for block in blocks_of(self.model, self.plan) if not isinstance(block.module, Stub)]

    def restore(self) -> None:
        """Restore all blocks on every stage, with the weights of the stage that holds them; all stages must call it."""
        self._hooks.close()
        for (module, name, i), owner in zip(blocks_of(self.model, self.plan), self._owners, strict=True):
            block = module.original if isinstance(module, Stub) else module
            # The wrapped pipeline may have been moved to another dtype or device, which stubs do not follow.
            kinds = [(weight.dtype, weight.device.type) for weight, *_ in tensors_of(block)]
            changed = _without_weights(block) if (name, i) in self._changed else None
            changed, kinds = self.group.broadcast_object((changed, kinds), src=owner)
            if isinstance(module, Stub):
                block = self.model.get_submodule(name)[i] = block if changed is None else changed
            for (weight, holder, key), (dtype, kind) in zip(tensors_of(block), kinds, strict=True):
                if weight.is_meta:
                    x = torch.empty_like(weight, dtype=dtype, device=self.group.device)
                    set_tensor(holder, key, weight, self.group.broadcast(x, src=owner).to(kind))
                else:
                    self.group.broadcast(weight.detach().to(self.group.device), src=owner)


def owners_of(model: nn.Module, plan: ModelPlan, layers: list[int]) -> list[int]:
    """The stage of each block; ``layers`` is each stage's number of blocks that are not ``hints``."""
    stages = [stage for stage, number in enumerate(layers) for _ in range(number)]
    return [stages[place] for place in _places(model, plan)]


def _places(model: nn.Module, plan: ModelPlan) -> list[int]:
    """For each block, the place of a block that is not in ``hints`` and is on the same stage.

    A block of hints is on the stage of the block after the one that its hint is added to: what the forward does between
    two blocks runs on the stage of the second one.
    """
    blocks, numbers = blocks_of(model, plan), count()
    last = sum(block.list_name not in plan.hints for block in blocks) - 1
    added = {name: sorted(model.config[layers]) for name, layers in plan.hints.items()}
    return [min(added[name][i] + 1, last) if name in added else next(numbers) for _, name, i in blocks]


def _described(block: nn.Module) -> list[tuple[str, torch.Size, type]]:
    """What must be equal in two modules to copy the weights of one to the other."""
    return [(key, x.shape, type(x)) for x, _, key in tensors_of(block)]


def _without_weights(block: nn.Module) -> nn.Module:
    """A copy of a block with its weights on the meta device."""
    memo = {}
    for x, owner, key in tensors_of(block):
        blank = x.detach().to("meta")
        memo[id(x)] = nn.Parameter(blank, x.requires_grad) if key in owner._parameters else blank
    return copy.deepcopy(block, memo)


def tensors_of(module: nn.Module) -> list[tuple[Tensor, nn.Module, str]]:
    """All parameters and buffers of a module tree: the tensor, the module that owns it, its name there."""
    return [
        (x, owner, key)
        for owner in module.modules()
        for key, x in (*owner._parameters.items(), *owner._buffers.items())
        if x is not None
    ]


def set_tensor(owner: nn.Module, key: str, old: Tensor, new: Tensor) -> None:
    """Replace a module's parameter or buffer."""
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(new, requires_grad=old.requires_grad)
    else:
        owner._buffers[key] = new
