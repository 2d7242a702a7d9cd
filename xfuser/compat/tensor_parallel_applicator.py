"""Tensor parallelism for models of the caller's own: each rank keeps some heads and some hidden units.

Megatron-LM, arXiv 1909.08053: of two linears one after the other, the first is divided by its outputs and the second by
its inputs, and one sum over the ranks completes each pair.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xfuser.core.distributed import get_tp_group
from xfuser.core.tensor_parallel.attention import Pairs
from xfuser.core.tensor_parallel.division import evenly
from xfuser.core.tensor_parallel.layers import Divided
from xfuser.core.tensor_parallel.pairs import feed_forward_pairs
from xfuser.core.tensor_parallel.structure import Describing

# What a linear of this name in an attention module computes: so many of queries, keys and values.
PROJECTIONS = {"wqkv": 3, "to_qkv": 3, "qkv": 3, "wq": 1, "to_q": 1, "q": 1, "wkv": 2, "to_kv": 2, "kv": 2}
PROJECTIONS |= dict.fromkeys(("wk", "wv", "to_k", "to_v", "k", "v"), 1)  # behind those of queries, as arguments are
OUTPUTS = ("wo", "to_out.0", "to_out", "out_proj", "proj", "o")
HEADS = ("n_heads", "num_heads", "heads")

BY_HEAD, BY_PROJECTION = "by_head", "by_projection"
LAYOUTS = (BY_HEAD, BY_PROJECTION)


class TensorParallelApplicator:
    """Leaves each rank its part of a model's attention and feed-forward modules.

    An attention module is one with linears for queries, keys and values, stacked (``wqkv``, ``wq`` and ``wkv``) or not,
    an output linear (``wo``) and its number of heads (``n_heads``). A feed-forward module has ``net.0.proj`` and
    ``net.2``, ``fc1`` and ``fc2``, or ``w1``, (``w3``) and ``w2``, or is a linear, an activation and a linear in a row.

    Args:
        tp_size, tp_rank: of the tensor-parallel group.
        stacked: the order of a stacked linear's outputs, ``"by_head"`` (``[H, 3, D]``, the default) or
            ``"by_projection"`` (``[3, H, D]``). Each module is first tried with made-up tokens, which shows its order;
            this one is for those that cannot be called so. Their first forward raises a ValueError if it is wrong.

    Raises:
        ValueError: this is not the place of this rank in the tensor-parallel group.
    """

    def __init__(self, tp_size: int, tp_rank: int, stacked: str | None = None) -> None:
        group = get_tp_group()
        if (tp_size, tp_rank) != (group.world_size, group.rank_in_group):
            raise ValueError(
                f"tp_size={tp_size}, tp_rank={tp_rank}: this is rank {group.rank_in_group} of the {group.world_size} of"
                " the tensor-parallel group; give these, or other degrees to initialize_model_parallel()"
            )
        if stacked not in (None, *LAYOUTS):
            raise ValueError(f"stacked={stacked!r} is unknown; known are {', '.join(map(repr, LAYOUTS))}")
        self._group, self._stacked = group, stacked

    def apply_to_model(self, model: nn.Module) -> None:
        """Divide ``model`` in place; call it on every rank of the group, with the same weights on each.

        Raises:
            ValueError: nothing in the model can be divided, or something that should be cannot.
        """
        if any(isinstance(module, Divided) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} is divided over ranks already")
        ranks = self._group.world_size
        modules = dict(model.named_modules())
        attentions = [found for name, module in modules.items() if (found := _attention(name, module))]
        feed_forwards = {
            name: found for name, one in modules.items() if (found := feed_forward_pairs(name, one, ranks))
        }
        if not attentions and not feed_forwards:
            raise ValueError(
                f"{type(model).__name__} has neither attention with linears named {', '.join(PROJECTIONS)} and"
                f" {', '.join(OUTPUTS)}, nor a feed-forward module: there is nothing to divide"
            )
        if ranks == 1:
            return
        describing = Describing(ranks)
        layouts = {attention.name: self._layout(attention) for attention in attentions}
        for attention in attentions:
            describing.add(attention.name, attention.module, attention.pairs(layouts[attention.name][0], ranks))
        for name, found in feed_forwards.items():
            describing.add(name, modules[name], found)
        describing.division.apply(model, self._group)
        for attention in attentions:
            layout, is_certain = layouts[attention.name]
            if not is_certain:
                attention.verify_at_first_forward(layout)

    def _layout(self, attention: "_Attention") -> tuple[str, bool]:
        """The order of an attention module's stacked linears, and whether its first forward need not confirm it."""
        seen = attention.layout()
        one_each = attention.heads < 2 * self._group.world_size  # then the order cannot be told any more behind this
        if one_each and seen is None and not self._stacked:
            raise ValueError(
                f"{attention.name}: {type(attention.module).__name__} must be told of which order"
                f" {', '.join(attention.stacked)} are: give stacked={' or '.join(map(repr, LAYOUTS))}"
            )
        return seen or self._stacked or BY_HEAD, bool(seen) or not attention.stacked or one_each


@dataclass
class _Attention:
    """An attention module, and what its linears are."""

    name: str
    module: nn.Module
    projections: dict[str, int]
    output: str
    heads_name: str
    head_dim: int

    @property
    def heads(self) -> int:
        return getattr(self.module, self.heads_name)

    def pairs(self, layout: str, ranks: int) -> Pairs:
        """How to divide the module by heads, of linears in this order."""
        heads = evenly(self.heads, ranks)
        channels = heads.times(self.head_dim)
        columns = {
            name: (heads.times(parts * self.head_dim),) if layout == BY_HEAD else (channels,) * parts
            for name, parts in self.projections.items()
        }
        own = tuple(map(len, heads.parts))
        return Pairs(columns, {self.output: (channels,)}, numbers={self.heads_name: own})

    @property
    def stacked(self) -> dict[str, int]:
        return {name: parts for name, parts in self.projections.items() if parts > 1}

    def layout(self) -> str | None:
        """The order in which the module reads its stacked linears, or None where it cannot be called to find out."""
        if not self.stacked or self.heads == 1:
            return BY_HEAD
        linears = [self.module.get_submodule(name) for name in self.projections]
        required = [
            name
            for name, parameter in inspect.signature(self.module.forward).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        weight = linears[0].weight
        widths = [linears[min(index, len(linears) - 1)].in_features for index in range(len(required))]
        made_up = [torch.zeros(1, 2, width, dtype=weight.dtype, device=weight.device) for width in widths]
        try:
            return next(
                (one for one in LAYOUTS if self._falls_silent(one, lambda: self.module.forward(*made_up))), None
            )
        except Exception:  # whatever a forward raises that wants other arguments
            return None

    def verify_at_first_forward(self, layout: str) -> None:
        """Let the module's next forward raise unless it reads its stacked linears in this order."""

        def verify(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            handle.remove()
            if not self._falls_silent(layout, lambda: module.forward(*args, **kwargs)):
                raise ValueError(
                    f"{self.name}: {type(module).__name__} does not read {', '.join(self.stacked)} {layout}; give the"
                    f" other of {LAYOUTS} to TensorParallelApplicator as stacked=, or leave this module out"
                )

        handle = self.module.register_forward_pre_hook(verify, with_kwargs=True)

    @torch.no_grad()
    def _falls_silent(self, layout: str, call: Callable[[], Any]) -> bool:
        """Whether what are the first head's values in this layout make what the output linear gets of that head."""
        seen: list[torch.Tensor] = []

        def replace(parts: int) -> Callable[..., torch.Tensor]:
            values = _places(self.heads, parts, self.head_dim, layout)[0, -1]

            def hook(linear: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
                seeded = torch.Generator("cpu").manual_seed(parts)
                numbers = torch.randn(output.shape, generator=seeded, device="cpu").to(output)
                numbers[..., values] = 0
                return numbers

            return hook

        get = self.module.get_submodule
        handles = [get(name).register_forward_hook(replace(parts)) for name, parts in self.stacked.items()]
        handles.append(
            get(self.output).register_forward_pre_hook(lambda linear, args: seen.append(args[0].nan_to_num()))
        )
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        return bool(seen) and all(not x[..., : self.head_dim].any() and x.any() for x in seen)


def _attention(name: str, module: nn.Module) -> _Attention | None:
    projections = {one: parts for one, parts in PROJECTIONS.items() if _linear(module, one)}
    output = next((one for one in OUTPUTS if _linear(module, one)), None)
    if sum(projections.values()) != 3 or output is None:
        return None
    heads_name = next((one for one in HEADS if isinstance(getattr(module, one, None), int)), None)
    if heads_name is None:
        raise ValueError(f"{name}: {type(module).__name__} has none of {', '.join(HEADS)}: its heads cannot be counted")
    heads, width = getattr(module, heads_name), module.get_submodule(output).in_features
    widths = {one: module.get_submodule(one).out_features for one in projections}
    if width % heads or any(widths[one] != parts * width for one, parts in projections.items()):
        raise ValueError(
            f"{name}: outputs of {widths} and {width} inputs of {output} are not those of {heads} heads, which queries,"
            " keys and values must have alike"
        )
    ranks = get_tp_group().world_size
    if heads < ranks:
        raise ValueError(
            f"{name}: {heads} heads cannot be divided over {ranks} ranks; use a lower tensor-parallel degree"
        )
    return _Attention(name, module, projections, output, heads_name, width // heads)


def _places(heads: int, parts: int, head_dim: int, layout: str) -> torch.Tensor:
    """Where a linear's outputs are: ``[H, parts, D]`` numbers of rows of its weight."""
    count = torch.arange(heads * parts * head_dim, device="cpu")
    if layout == BY_HEAD:
        return count.view(heads, parts, head_dim)
    return count.view(parts, heads, head_dim).transpose(0, 1)


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None
