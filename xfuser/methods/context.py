"""Sequence parallelism of a transformer without a plan here, by the context-parallel plan of its Diffusers class.

Such a plan names the arguments and outputs of modules to split, and the outputs to gather. It does not say which tokens
each attention module sees, so the ranks exchange their token counts, once for each situation.
"""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import combinations
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from xfuser.call import Forward
from xfuser.core.attention.kernels import additive
from xfuser.core.attention.usp import usp_attention
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.distributed.utils import split_sizes
from xfuser.core.hooks import Arguments, edited_arguments, edited_output
from xfuser.core.logger import logger
from xfuser.methods.sharded import ShardedModel
from xfuser.models.plan import ModelPlan, matching

TEXT = "encoder_hidden_states"


class ContextParallel(ShardedModel):
    """USP of one transformer over one group, by ``plan.context``; used in place of :class:`SequenceParallel`."""

    def __init__(
        self, model: nn.Module, plan: ModelPlan, group: SequenceParallelGroupCoordinator, backend: str = "auto"
    ) -> None:
        super().__init__(model, plan, group, backend)
        self._rank, self._ranks = group.rank_in_group, group.world_size
        self._named: list[tuple[str, dict[Any, Any]]] = []  # modules and what to split there
        self._gathered: dict[str, int] = {}  # modules whose output to gather, and along which dimension
        for pattern, spec in plan.context.items():
            for name in matching(model, pattern):
                if isinstance(spec, dict):
                    self._named.append((name, spec))
                else:
                    self._gathered[name] = spec.gather_dim
        self._splits_text = any(TEXT in spec for _, spec in self._named)
        self._lengths: dict[tuple, list[list[int]]] = {}  # of queries and keys of all ranks, by situation
        self._reset()
        logger.info(
            "This library has no plan for %s: sequence parallelism uses its context-parallel plan from Diffusers."
            " PipeFusion requires a plan.",
            type(model).__name__,
        )

    def _reset(self) -> None:
        """Clear the state of one forward."""
        self._totals: list[int] = []  # token counts of what has been split
        self._given: set[int] = set()  # token counts of the forward's arguments
        self._calls: dict[str, int] = {}
        self._unsplit: set[str] = set()  # attention modules whose text is not split

    def _hooks(self) -> Iterator[AbstractContextManager[None]]:
        for name, spec in self._named:
            if name:
                module = self._model.get_submodule(name)
                yield edited_arguments(module, partial(self._split, spec, module))
                yield edited_output(module, partial(self._split_output, spec))
        for name, dim in self._gathered.items():
            yield edited_output(self._model.get_submodule(name), partial(self._gather, dim))
        for name in self._attention_places():
            yield edited_arguments(self._model.get_submodule(name), partial(self._enter_attention, name))

    def _wrapper(self, forward: Forward, arguments: Arguments) -> Any:
        try:
            self._given = {x.shape[1] for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.dim() > 1}
            for name, spec in self._named:
                if not name:
                    self._split(spec, self._model, arguments)
            return forward(arguments)
        finally:
            self._reset()

    def _split(self, spec: dict[Any, Any], module: nn.Module, arguments: Arguments) -> None:
        names = list(inspect.signature(module.forward).parameters)
        for key, entry in spec.items():
            if _splits_output(entry):
                continue
            name = names[key] if isinstance(key, int) else key
            if arguments.get(name) is not None:
                arguments[name] = self._cut(arguments[name], entry)

    def _split_output(self, spec: dict[Any, Any], output: Any) -> Any:
        entries = {key: entry for key, entry in spec.items() if _splits_output(entry)}
        if not entries:
            return output
        if isinstance(output, Tensor):
            return self._cut(output, entries[0])
        return tuple(self._cut(x, entries[i]) if i in entries else x for i, x in enumerate(output))

    def _cut(self, value: Any, entry: Any) -> Any:
        if isinstance(entry, list | tuple):
            return type(value)(self._cut(x, one) for x, one in zip(value, entry, strict=True))
        return tree_map_only(Tensor, lambda x: self._cut_tensor(x, entry), value)

    def _cut_tensor(self, x: Tensor, entry: Any) -> Tensor:
        if entry.expected_dims not in (None, x.dim()):
            return x
        total = x.shape[entry.split_dim]
        if total < self._ranks:
            raise ValueError(
                f"{total} tokens are fewer than the {self._ranks} ranks of sequence parallelism: use a degree of at"
                f" most {total} for this {type(self._model).__name__}, or write a plan for it"
            )
        if total not in self._totals:
            self._totals.append(total)
        return x.split(split_sizes(total, self._ranks), dim=entry.split_dim)[self._rank]

    def _gather(self, dim: int, output: Any) -> Any:
        return tree_map_only(Tensor, lambda x: self._group.all_gather(x, dim=dim), output)

    def _enter_attention(self, name: str, arguments: Arguments) -> None:
        """Note attention to text that is not split: every rank has all of it, so attention is local."""
        if arguments.get(TEXT) is not None and not self._splits_text:
            self._unsplit.add(name)

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if name in self._unsplit:
            return self._local(q, k, v, mask, scale)
        queries, keys = self._exchange(name, q.shape[2], k.shape[2])
        if not self._is_split(name, keys):
            return self._local(q, k, v, mask, scale)
        mask = None if mask is None else additive(mask[(None,) * (4 - mask.dim())], q.dtype)
        if mask is not None and mask.shape[2:] != (1, k.shape[2]):
            raise ValueError(
                f"{name}: an attention mask of shape {tuple(mask.shape)} does not cover just the {k.shape[2]}"
                f" keys of this rank: write a plan for {type(self._model).__name__} that says how to split it"
            )
        return usp_attention(
            q, k, v, keys, self._group, query_lengths=queries, mask=mask, scale=scale, backend=self._backend
        )

    def _exchange(self, name: str, queries: int, keys: int) -> tuple[list[int], list[int]]:
        """Rows of queries and keys of all ranks, gathered once for each situation, which is the same on all ranks."""
        call = self._calls[name] = self._calls.get(name, 0) + 1
        situation = (name, call, *self._totals)
        if situation not in self._lengths:
            self._lengths[situation] = gather_numbers([queries, keys], self._group.cpu_group)
        return tuple(list(counts) for counts in zip(*self._lengths[situation], strict=True))

    def _is_split(self, name: str, lengths: list[int]) -> bool:
        """Whether sequences of these lengths on the ranks are shares of what has been split.

        If not, every rank has the whole sequence: as many tokens as an argument of the forward, or as what was split.

        Raises:
            ValueError: neither holds.
        """
        known = self._totals * 2  # two streams, such as text and image, may have the same length
        for count in range(1, len(known) + 1):
            for totals in combinations(known, count):
                shares = zip(*(split_sizes(total, self._ranks) for total in totals), strict=True)
                if [sum(one) for one in shares] == lengths:
                    return True
        if len(set(lengths)) == 1 and lengths[0] in {*self._given, *self._totals}:
            return False
        raise ValueError(
            f"{name} attends to {lengths} tokens on the ranks, which are neither shares of the {self._totals} tokens"
            f" that were split nor whole: Diffusers' context-parallel plan of {type(self._model).__name__} does not"
            " explain them; write a plan for it (docs/adding_models/README.md), or use CFG or data parallelism"
        )


def _splits_output(entry: Any) -> bool:
    return bool(getattr(entry[0] if isinstance(entry, list | tuple) else entry, "split_output", False))
