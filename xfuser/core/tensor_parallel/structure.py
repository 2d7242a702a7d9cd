"""How to divide a model: in pairs where its modules are known, elsewhere each layer by its outputs.

A pair is a first layer divided by its outputs and a second one divided by its inputs, with one sum over the ranks
behind (arXiv 1909.08053). What lies in between must work on each head or channel alone. A module is taken for one that
does so only if it has the layers of a table here (``attention.py``, ``pairs.py``) and no other parameters; what is in
no table is divided by its outputs, which are gathered: that sends more, and is exact whatever the module does.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from xfuser.core.tensor_parallel.attention import Pairs, attention_pairs, fused_block_pairs
from xfuser.core.tensor_parallel.division import Division, Section, cut, evenly
from xfuser.core.tensor_parallel.layers import Divided, Gathered, SpanningNorm, SpanningRMSNorm, Summed, SummedOfAll
from xfuser.core.tensor_parallel.pairs import feed_forward_pairs, inverted_pairs, residual_pairs

SMALLEST = 2**16  # weights of a layer that is worth a message of its own
FINDERS = (fused_block_pairs, attention_pairs, feed_forward_pairs, residual_pairs, inverted_pairs)
OUTPUTS = {nn.Linear: "out_features", nn.Embedding: "embedding_dim"}  # what counts them
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def describe(model: nn.Module, ranks: int, scheme: str | None = None, whole: tuple[str, ...] = ()) -> Division:
    """How to divide ``model`` over ``ranks``; nothing is changed, and weights may be on the meta device.

    Args:
        scheme: None for pairs where they are known, and outputs elsewhere; ``"col"`` for each layer's outputs, which
            are gathered; ``"row"`` for each layer's inputs, with partial sums added up.
        whole: names of modules in which nothing is divided, as their weights are used without calling them.

    Raises:
        ValueError: an attention module has fewer heads than there are ranks, or another library has replaced the
            forward of a layer that is to be divided.
    """
    excluded = tuple(f"{name}." for name in whole)
    modules = {name: one for name, one in model.named_modules() if not (excluded and f"{name}.".startswith(excluded))}
    describing = Describing(ranks)
    if scheme is None:
        for name, module in modules.items():
            describing.pairs(name, module)
    shared = _shared_by_unlike(modules)
    for name, module in modules.items():
        if type(module) in LAYERS and id(module.weight) not in shared:
            describing.single(name, module, scheme)
    for name in describing.division.completions:
        if "forward" in vars(modules[name]):
            raise ValueError(
                f"{name} of {type(model).__name__} has a forward that is not its class's, which tensor parallelism"
                " cannot complete: remove what replaced it, as offload to the CPU layer by layer and weights in 8"
                " bits do"
            )
    return describing.division


class Describing:
    """A division in the making, of what is known of a model's modules."""

    def __init__(self, ranks: int) -> None:
        self.division = Division(ranks)
        self._ranks = ranks
        self._done: set[str] = set()

    def pairs(self, name: str, module: nn.Module) -> None:
        """Divide what is known of a module, unless a module that it is in was."""
        if name in self._done:
            return
        found = next((pairs for find in FINDERS if (pairs := find(name, module, self._ranks))), None)
        if found:
            self.add(name, module, found)

    def single(self, name: str, layer: nn.Module, scheme: str | None) -> None:
        """Divide a layer by itself: its outputs, or, by ``row``, its inputs."""
        if name in self._done or layer.weight.numel() < SMALLEST or getattr(layer, "groups", 1) > 1:
            return
        embeds = isinstance(layer, nn.Embedding)
        by_inputs = scheme == "row" and not embeds
        size = layer.weight.shape[1 if embeds or by_inputs else 0]
        if size < self._ranks:
            return
        section = evenly(size, self._ranks)
        if by_inputs:
            self._keep_inputs(name, layer, (section,), SummedOfAll)
        else:
            self._keep_outputs(name, layer, (section,))
            self.division.completions[name] = Gathered, cut(-1, section)

    def add(self, name: str, module: nn.Module, found: Pairs) -> None:
        """Divide a module in these pairs."""
        layers = dict(module.named_modules(prefix=name))
        found = found.within(name)
        for layer, sections in found.columns.items():
            self._keep_outputs(layer, layers[layer], sections)
            if type(layers[layer]) in LAYERS:
                self._number(f"{layer}.{OUTPUTS.get(type(layers[layer]), 'out_channels')}", cut(0, *sections).sizes)
        for layer, sections in found.rows.items():
            self._keep_inputs(layer, layers[layer], sections, Summed)
            counted = "in_features" if isinstance(layers[layer], nn.Linear) else "in_channels"
            self._number(f"{layer}.{counted}", cut(0, *sections).sizes)
        for norm, section in found.spanning.items():
            self._spanning(norm, layers[norm], section)
        for path, values in found.numbers.items():
            self._number(path, values)
        self.division.heads |= found.heads
        self._done |= layers.keys() - {name for name, one in layers.items() if type(one) in LAYERS}

    def _keep_outputs(self, name: str, layer: nn.Module, sections: tuple[Section, ...]) -> None:
        """Keep these outputs of a layer, or channels of a norm."""
        for key, parameter in layer.named_parameters(recurse=False):
            is_table = isinstance(layer, nn.Embedding) and parameter.dim() > 1
            self.division.cuts[f"{name}.{key}"] = cut(int(is_table), *sections)
        self._done.add(name)

    def _keep_inputs(self, name: str, layer: nn.Module, sections: tuple[Section, ...], kind: type[Divided]) -> None:
        """Keep the weights of these inputs of a layer, and add up."""
        inputs = cut(1, *sections)
        self.division.cuts[f"{name}.weight"] = inputs
        self.division.completions[name] = kind, inputs
        self._done.add(name)

    def _spanning(self, name: str, norm: nn.Module, section: Section) -> None:
        channels = cut(-1, section)
        is_rms = type(norm).__name__.endswith("RMSNorm") and getattr(norm, "bias", None) is None
        if not is_rms or not hasattr(norm, "eps") or sum(channels.sizes) > channels.total:
            self.division.completions[name] = SpanningNorm, channels
            return
        self.division.completions[name] = SpanningRMSNorm, channels
        for key, _ in norm.named_parameters(recurse=False):
            self.division.cuts[f"{name}.{key}"] = cut(0, section)
        if hasattr(norm, "normalized_shape"):
            self._number(f"{name}.normalized_shape", [(size,) for size in channels.sizes])

    def _number(self, path: str, values: Iterable[Any]) -> None:
        name, _, key = path.rpartition(".")
        self.division.numbers.setdefault(name, {})[key] = tuple(values)


def _shared_by_unlike(modules: dict[str, nn.Module]) -> set[int]:
    """Weights that layers of several kinds share, as a head does with an embedding."""
    kinds: dict[int, set[type]] = {}
    for module in modules.values():
        if type(module) in LAYERS:
            kinds.setdefault(id(module.weight), set()).add(type(module))
    return {weight for weight, those in kinds.items() if len(those) > 1}
