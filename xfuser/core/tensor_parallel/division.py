"""How a model, or one of its modules, is divided over ranks: the description, and its application."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.tensor_parallel.layers import Divided, SpanningNorm, SpanningRMSNorm, Summed, complete
from xfuser.core.tensor_parallel.shards import Shards

# The layers whose weights are divided, and the attributes that count the entries of a weight's first two dimensions.
COUNTS = {nn.Linear: ("out_features", "in_features"), nn.Embedding: ("num_embeddings", "embedding_dim")}
COUNTS |= dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("out_channels", "in_channels"))


@dataclass
class Division:
    """The parts of a model's modules that each rank keeps.

    Attributes:
        cuts: names of parameters, to the divided dimension and its shards. Other parameters are complete on every rank.
        completions: names of modules, to the class that completes their forward (``layers.py``) and its shards. Modules
            whose divided forward requires no completion are not included.
        numbers: names of attributes that count divided entries (``attn.heads``), to their value on each rank.
        heads: names of attention modules that are divided by heads, to the heads of each rank.
    """

    cuts: dict[str, tuple[int, Shards]] = field(default_factory=dict)
    completions: dict[str, tuple[type[Divided], Shards]] = field(default_factory=dict)
    numbers: dict[str, Sequence[Any]] = field(default_factory=dict)
    heads: dict[str, Shards] = field(default_factory=dict)

    def outputs(self, name: str, layer: nn.Module, shards: Shards, kind: type[Divided] | None = None) -> None:
        """Divide the outputs of a layer, or the channels of a norm; ``kind`` or a later layer completes the forward."""
        dim = int(isinstance(layer, nn.Embedding))
        for key, _ in layer.named_parameters(recurse=False):
            self.cuts[f"{name}.{key}"] = dim, shards
        if kind:
            self.completions[name] = kind, shards
        elif type(layer) in COUNTS:
            self.numbers[f"{name}.{COUNTS[type(layer)][dim]}"] = shards.sizes

    def inputs(self, name: str, layer: nn.Module, shards: Shards, kind: type[Summed] = Summed) -> None:
        """Divide the inputs of a layer, and sum its outputs over the ranks."""
        self.cuts[f"{name}.weight"] = 1, shards
        self.completions[name] = kind, shards
        if kind is Summed:
            self.numbers[f"{name}.{COUNTS[type(layer)][1]}"] = shards.sizes

    def spanning(self, name: str, norm: nn.Module, shards: Shards) -> None:
        """Divide a norm over the channels of all heads, of which each rank has some."""
        is_rms = type(norm).__name__.endswith("RMSNorm") and getattr(norm, "bias", None) is None
        if not is_rms or not hasattr(norm, "eps") or sum(shards.sizes) > shards.total:
            self.completions[name] = SpanningNorm, shards
            return
        self.outputs(name, norm, shards, SpanningRMSNorm)
        if hasattr(norm, "normalized_shape"):
            self.numbers[f"{name}.normalized_shape"] = [(size,) for size in shards.sizes]

    def add(self, name: str, module: "Division") -> None:
        """Add ``module``, the division of the module of this name."""
        for mine, others in zip(vars(self).values(), vars(module).values(), strict=True):
            mine |= {f"{name}.{key}".strip("."): value for key, value in others.items()}

    def kept(self, rank: int) -> dict[str, tuple[int, tuple[range, ...]]]:
        """Map the name of each divided parameter to the divided dimension and the ranges of it that ``rank`` keeps.

        A loader needs no other information: it reads these ranges, concatenated along the dimension, and all other
        parameters whole. The names are those of the undivided model.
        """
        return {name: (dim, shards.kept[rank]) for name, (dim, shards) in self.cuts.items()}

    def apply(self, model: nn.Module, group: GroupCoordinator) -> Callable[[], None]:
        """Cut the model's parameters in place to the parts that this rank keeps, and make its modules work on them.

        Parameters on the meta device are cut there, to be loaded by the ranges of :meth:`kept`.

        Returns:
            A function that undoes the division. All ranks must call it, and need memory for the gathered parameters.
        """
        rank = group.rank_in_group
        modules = dict(model.named_modules(remove_duplicate=False))
        before = {path: attrgetter(path)(model) for path in self.numbers}
        self._replace(modules, lambda x, dim, shards: shards.part(x, dim, rank).clone())
        for name, (kind, shards) in self.completions.items():
            complete(modules[name], kind, shards, group)
        _set(modules, {path: values[rank] for path, values in self.numbers.items()})

        def gathered(x: Tensor, dim: int, shards: Shards) -> Tensor:
            parts = group.all_gather(x.to(group.device), dim, separate_tensors=True, sizes=shards.sizes)
            return shards.full(parts, dim).to(x.device)

        def restore() -> None:
            self._replace(modules, gathered)
            for name in self.completions:
                modules[name].undivided()
            _set(modules, before)

        return restore

    @torch.no_grad()
    def _replace(self, modules: dict[str, nn.Module], change: Callable[[Tensor, int, Shards], Tensor]) -> None:
        """Replace the divided parameters; a parameter that several modules share stays shared."""
        replaced: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, cut in self.cuts.items():
            owner, _, key = name.rpartition(".")
            parameters = modules[owner]._parameters
            old = parameters[key]
            if id(old) not in replaced:
                replaced[id(old)] = old, nn.Parameter(change(old.detach(), *cut), requires_grad=old.requires_grad)
            parameters[key] = replaced[id(old)][1]


def _set(modules: dict[str, nn.Module], numbers: dict[str, Any]) -> None:
    for path, value in numbers.items():
        owner, _, key = path.rpartition(".")
        setattr(modules[owner], key, value)
