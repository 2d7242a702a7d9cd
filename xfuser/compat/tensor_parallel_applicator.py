"""Tensor parallelism for any model with common layer names: each rank keeps some heads and some hidden units.

Megatron-LM, arXiv 1909.08053: of two consecutive linears, the first is divided by its outputs and the second by its
inputs; one sum over the ranks completes each pair.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfuser.config.config import check_known
from xfuser.core.distributed import get_tp_group
from xfuser.core.tensor_parallel.division import Division
from xfuser.core.tensor_parallel.layers import Divided
from xfuser.core.tensor_parallel.pairs import feed_forward_division
from xfuser.core.tensor_parallel.shards import evenly, joined

# Linears of an attention module, to how many of queries, keys and values each computes.
PROJECTIONS = {"wqkv": 3, "to_qkv": 3, "qkv": 3, "wq": 1, "to_q": 1, "q": 1, "wkv": 2, "to_kv": 2, "kv": 2}
PROJECTIONS |= dict.fromkeys(("wk", "wv", "to_k", "to_v", "k", "v"), 1)
OUTPUTS = ("wo", "to_out.0", "to_out", "out_proj", "proj", "o")
HEADS = ("n_heads", "num_heads", "heads")

BY_HEAD, BY_PROJECTION = "by_head", "by_projection"
ORDERS = {"wqkv": BY_HEAD, "wkv": BY_HEAD}  # Step-Video's; all others are by projection, as in timm and Diffusers


class TensorParallelApplicator:
    """Divides a model's attention and feed-forward modules over the ranks.

    An attention module has linears for queries, keys and values, stacked (``wqkv``, ``wq`` and ``wkv``) or not, an
    output linear (``wo``) and its number of heads (``n_heads``). A feed-forward module has ``net.0.proj`` and
    ``net.2``, ``fc1`` and ``fc2``, or ``w1``, (``w3``) and ``w2``, or is a linear, an activation and a linear in a row.

    Args:
        tp_size, tp_rank: size of the tensor-parallel group, and this rank's position in it.
        stacked: the order of a stacked linear's outputs, ``"by_head"`` (``[H, 3, D]``) or ``"by_projection"``
            (``[3, H, D]``), for all of them or by the linear's name. By default, ``wqkv`` and ``wkv`` are by head, and
            others by projection. The first forward of a module raises a ValueError if it reads them in another order.

    Raises:
        ValueError: ``tp_size`` and ``tp_rank`` do not match the tensor-parallel group, or an order is unknown.
    """

    def __init__(self, tp_size: int, tp_rank: int, stacked: str | dict[str, str] | None = None) -> None:
        group = get_tp_group()
        if (tp_size, tp_rank) != (group.world_size, group.rank_in_group):
            raise ValueError(
                f"tp_size={tp_size}, tp_rank={tp_rank}: this is rank {group.rank_in_group} of {group.world_size} in the"
                " tensor-parallel group; pass these values, or other degrees to initialize_model_parallel()"
            )
        self._group, self._stacked = group, stacked or {}
        if isinstance(self._stacked, str):
            self._stacked = dict.fromkeys(PROJECTIONS, self._stacked)
        for order in self._stacked.values():
            check_known("stacked", order, (BY_HEAD, BY_PROJECTION))

    def apply_to_model(self, model: nn.Module) -> None:
        """Divide ``model`` in place; call it on every rank of the group, with the same weights on each.

        Raises:
            ValueError: nothing in the model can be divided, or something that should be cannot.
        """
        if any(isinstance(module, Divided) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} is divided over ranks already")
        division, attentions = Division(), []
        for name, module in model.named_modules():
            if attention := _attention(name, module, self._group.world_size):
                division.add(name, attention.division(self._group.world_size, self._stacked))
                attentions.append(attention)
            elif found := feed_forward_division(name, module, self._group.world_size):
                division.add(name, found)
        if not division.cuts:
            raise ValueError(
                f"{type(model).__name__} has neither attention with linears named {', '.join(PROJECTIONS)} and"
                f" {', '.join(OUTPUTS)}, nor a feed-forward module: there is nothing to divide"
            )
        if self._group.world_size > 1:
            division.apply(model, self._group)
            for attention in attentions:
                attention.verify_at_first_forward()


class _Attention:
    """An attention module and its linears."""

    def __init__(self, name: str, module: nn.Module, projections: dict[str, int], output: str, heads_name: str) -> None:
        self.name, self.module, self.projections, self.output = name, module, projections, output
        self.heads_name, self.heads = heads_name, getattr(module, heads_name)
        self.head_dim = module.get_submodule(output).in_features // self.heads
        self.orders: dict[str, str] = {}  # of the linears whose order the first forward must confirm

    def division(self, ranks: int, stacked: dict[str, str]) -> Division:
        """How to divide the module by heads; linears not in ``stacked`` have the default order of their name."""
        heads, get = evenly(self.heads, ranks), self.module.get_submodule
        division, channels = Division(numbers={self.heads_name: heads.sizes}), heads.times(self.head_dim)
        for name, parts in self.projections.items():
            order = stacked.get(name, ORDERS.get(name, BY_PROJECTION))
            by_head = order == BY_HEAD
            division.outputs(name, get(name), channels.times(parts) if by_head else joined(*[channels] * parts))
            if parts == 1 or ranks == 1:
                continue
            if min(heads.sizes) > 1:
                self.orders[name] = order
            elif name not in stacked:
                raise ValueError(
                    f"{self.name}: a rank has one head of {type(self.module).__name__}, so its forward cannot"
                    f" confirm the order of {name}: give stacked={BY_HEAD!r} or {BY_PROJECTION!r}"
                )
        division.inputs(self.output, get(self.output), channels)
        return division

    def verify_at_first_forward(self) -> None:
        """Make the module's next forward raise unless it reads its stacked linears in the order used to divide them."""

        def verify(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            handle.remove()
            if not self._reads_first_head(args, kwargs):
                orders = " and ".join(f"{name} {order}" for name, order in self.orders.items())
                raise ValueError(
                    f"{self.name}: {type(module).__name__} does not read {orders}; give the other of {BY_HEAD!r} and"
                    f" {BY_PROJECTION!r} to TensorParallelApplicator as stacked=, or leave this module out"
                )

        if self.orders:
            handle = self.module.register_forward_pre_hook(verify, with_kwargs=True)

    @torch.no_grad()
    def _reads_first_head(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether zeroing the first head's values, by the assumed orders, zeroes the first head of ``output``'s input.

        A wrong order would give a wrong result without an error, as both orders have the same shape.
        """
        seen: list[Tensor] = []

        def zero_values(linear: nn.Module, args: tuple, output: Tensor, name: str) -> Tensor:
            heads, parts = getattr(self.module, self.heads_name), self.projections[name]
            seeded = torch.Generator("cpu").manual_seed(parts)
            numbers = torch.randn(output.shape, generator=seeded, device="cpu").to(output)
            start = (parts - 1) * self.head_dim * (1 if self.orders[name] == BY_HEAD else heads)
            numbers[..., start : start + self.head_dim] = 0
            return numbers

        get = self.module.get_submodule
        handles = [get(name).register_forward_hook(partial(zero_values, name=name)) for name in self.orders]
        handles.append(
            get(self.output).register_forward_pre_hook(lambda linear, args: seen.append(args[0].nan_to_num()))
        )
        try:
            self.module.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return bool(seen) and all(not x[..., : self.head_dim].any() and x.any() for x in seen)


def _attention(name: str, module: nn.Module, ranks: int) -> _Attention | None:
    """Find the linears of an attention module; None for other modules.

    Raises:
        ValueError: its number of heads is unknown or less than that of ranks, or its linears do not match it.
    """
    linears = {one for one, inner in module.named_modules(remove_duplicate=False) if isinstance(inner, nn.Linear)}
    projections = {one: parts for one, parts in PROJECTIONS.items() if one in linears}
    output = next((one for one in OUTPUTS if one in linears), None)
    if sum(projections.values()) != 3 or output is None:
        return None
    heads_name = next((one for one in HEADS if isinstance(getattr(module, one, None), int)), None)
    if heads_name is None:
        raise ValueError(f"{name}: {type(module).__name__} has none of {', '.join(HEADS)}: its heads cannot be counted")
    heads, width = getattr(module, heads_name), module.get_submodule(output).in_features
    widths = {one: module.get_submodule(one).out_features for one in projections}
    if width % heads or any(widths[one] != parts * width for one, parts in projections.items()):
        raise ValueError(
            f"{name}: outputs of {widths} and {width} inputs of {output} do not match {heads} heads; queries, keys"
            " and values must have the same number of heads"
        )
    if heads < ranks:
        raise ValueError(
            f"{name}: {heads} heads cannot be divided over {ranks} ranks; use a lower tensor-parallel degree"
        )
    return _Attention(name, module, projections, output, heads_name)
