"""Determines how to divide a model: known modules in pairs, all other layers by their outputs.

A pair is a first layer divided by its outputs and a second one divided by its inputs, with one sum over the ranks
after it (arXiv 1909.08053). All code between them must work on each head or channel separately. A module is assumed to
do so only if it has the layers of a table (``attention.py``, ``pairs.py``) and no other parameters. Layers that are in
no table are divided by their outputs, which are gathered: this sends more data, and is exact for any module.
"""

from collections.abc import Collection

from torch import nn

from xfuser.core.tensor_parallel.attention import attention_division, fused_block_division
from xfuser.core.tensor_parallel.division import COUNTS, Division
from xfuser.core.tensor_parallel.layers import Gathered, SummedOfAll
from xfuser.core.tensor_parallel.pairs import feed_forward_division, inverted_division, residual_division
from xfuser.core.tensor_parallel.shards import evenly

SMALLEST = 2**16  # minimum number of weights of a layer that is divided outside of a pair
FINDERS = (fused_block_division, attention_division, feed_forward_division, residual_division, inverted_division)


def describe(
    model: nn.Module,
    ranks: int,
    scheme: str | None = None,
    undivided: tuple[str, ...] = (),
    unpaired: Collection[str] = (),
) -> Division:
    """How to divide ``model`` over ``ranks``. The model is not changed; weights may be on the meta device.

    Args:
        scheme: None divides known modules in pairs, and other layers by outputs; ``"col"`` divides each layer's
            outputs, which are gathered; ``"row"`` divides each layer's inputs, and sums the partial outputs.
        undivided: names of modules in which nothing is divided, as their weights are used without calling them.
        unpaired: names of modules that are not divided in pairs, whatever layers they have.

    Raises:
        ValueError: an attention module has fewer heads than there are ranks, or another library has replaced the
            forward of a layer that is to be divided.
    """
    excluded = tuple(f"{name}." for name in undivided)
    modules = {name: one for name, one in model.named_modules() if not (excluded and f"{name}.".startswith(excluded))}
    division = _in_pairs(modules, ranks, unpaired) if scheme is None else Division()
    shared = _shared_by_unlike(modules)
    for name, module in modules.items():
        if type(module) in COUNTS and id(module.weight) not in shared and f"{name}.weight" not in division.cuts:
            _divide_alone(division, name, module, ranks, scheme)
    for name in division.completions:
        if "forward" in vars(modules[name]):
            raise ValueError(
                f"{name} of {type(model).__name__} has a forward that is not its class's, which tensor parallelism"
                " does not support: remove what replaced it, such as layer-wise CPU offload or 8-bit weights"
            )
    return division


def _in_pairs(modules: dict[str, nn.Module], ranks: int, unpaired: Collection[str]) -> Division:
    """Divide the known modules in pairs, outermost modules first."""
    division, done = Division(), set(unpaired)
    for name, module in modules.items():
        found = next((one for find in FINDERS if name not in done and (one := find(name, module, ranks))), None)
        if found:
            division.add(name, found)
            done |= {inner for inner, _ in module.named_modules(prefix=name)}
    return division


def _divide_alone(division: Division, name: str, layer: nn.Module, ranks: int, scheme: str | None) -> None:
    """Divide a layer by its outputs, or with ``"row"`` by its inputs, if it is large enough."""
    if layer.weight.numel() < SMALLEST or getattr(layer, "groups", 1) > 1:
        return
    is_table = isinstance(layer, nn.Embedding)
    by_inputs = scheme == "row" and not is_table
    size = layer.weight.shape[1 if is_table or by_inputs else 0]
    if size < ranks:
        return
    if by_inputs:
        division.inputs(name, layer, evenly(size, ranks), SummedOfAll)
    else:
        division.outputs(name, layer, evenly(size, ranks), Gathered)


def _shared_by_unlike(modules: dict[str, nn.Module]) -> set[int]:
    """Ids of weights that layers of several classes share, such as an output head and an embedding."""
    kinds: dict[int, set[type]] = {}
    for module in modules.values():
        if type(module) in COUNTS:
            kinds.setdefault(id(module.weight), set()).add(type(module))
    return {weight for weight, those in kinds.items() if len(those) > 1}
