"""Adapters (LoRA, arXiv 2106.09685) that are loaded into models whose layers are divided over ranks.

While a loader of Diffusers or PEFT runs, divided layers have their undivided sizes, so the loader creates full-size
adapters. The adapters are then divided like their layers: if a rank keeps some outputs of a layer, it keeps these
outputs of the second matrix; if it keeps some inputs, it keeps these inputs of the first matrix. The product of both
matrices then has the size of the rank's shard of the layer, and can be fused into it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.tensor_parallel.division import COUNTS, Division
from xfuser.core.tensor_parallel.shards import Shards

# Methods of Diffusers pipelines and models, and of Transformers models, that add adapters to layers.
LOADING = ("load_lora_weights", "load_lora_adapter", "load_adapter", "add_adapter")
MATRICES = ("lora_A", "lora_B")  # the first takes a layer's inputs, the second returns its outputs


class DividedAdapters:
    """The adapters of one divided model.

    Args:
        division: how the model was divided. Adapters wrap its layers; the layer objects stay the same.

    Attributes:
        divided: names of the adapter weights of which this rank holds a shard.
    """

    def __init__(self, model: nn.Module, division: Division, group: GroupCoordinator) -> None:
        self._model, self._division, self._group = model, division, group
        self._layers = {
            name: layer for name, layer in model.named_modules() if f"{name}.weight" in division.cuts and _kind(layer)
        }
        self._restore: Callable[[], None] | None = None
        self.divided: list[str] = []

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within the context, layers and adapters have their undivided sizes. All ranks must enter it."""
        self.restore()
        own = [(layer, layer.weight, self._sizes(layer)) for layer in self._layers.values()]
        for name, layer in self._layers.items():
            self._enlarge(layer, *self._division.cuts[f"{name}.weight"])
        try:
            yield
        finally:
            for layer, weight, sizes in own:
                layer._parameters["weight"] = weight
                vars(layer).update(sizes)
            self._divide()

    def restore(self) -> None:
        """Restore the full adapters on every rank. All ranks must call it."""
        if self._restore:
            self._restore()
            self._restore, self.divided = None, []

    def _sizes(self, layer: nn.Module) -> dict[str, int]:
        return {name: getattr(layer, name) for name in COUNTS[_kind(layer)]}

    def _enlarge(self, layer: nn.Module, dim: int, shards: Shards) -> None:
        """Give a layer its undivided size without allocating memory for it."""
        shape = list(layer.weight.shape)
        shape[dim] = shards.total
        with torch.no_grad():
            stand_in = nn.Parameter(layer.weight.new_zeros(()).expand(shape), requires_grad=False)
        layer._parameters["weight"] = stand_in
        setattr(layer, COUNTS[_kind(layer)][dim], shards.total)

    def _divide(self) -> None:
        """Divide the adapters that have been loaded.

        Raises:
            ValueError: an adapter is of a kind that cannot be divided, or a layer was replaced by a larger one.
        """
        modules, division = dict(self._model.named_modules()), Division()
        places = {module: name for name, module in modules.items()}
        for name, layer in self._layers.items():
            if layer not in places:
                raise _cannot(f"{name} was replaced by a layer of another size")
            holder, _, last = places[layer].rpartition(".")
            if last == "base_layer":
                self._divide_one(division, name, holder, modules[holder])
        self.divided = sorted(division.cuts)
        if division.cuts:
            self._restore = division.apply(self._model, self._group)

    def _divide_one(self, division: Division, name: str, holder: str, adapter: nn.Module) -> None:
        others = [kind for kind in adapter.adapter_layer_names if kind not in MATRICES and len(getattr(adapter, kind))]
        if others or not hasattr(adapter, MATRICES[0]):
            raise _cannot(f"{name} has a {type(adapter).__name__} with {' and '.join(others) or 'other weights'}")
        dim, shards = self._division.cuts[f"{name}.weight"]
        kind, _ = self._division.completions.get(name, (None, None))
        matrices, divide = MATRICES[1 - dim], division.inputs if dim else division.outputs
        for key, matrix in getattr(adapter, matrices).items():
            if type(matrix) in COUNTS:  # adapters loaded before the wrap were divided by it
                divide(f"{holder}.{matrices}.{key}", matrix, shards, kind)


def _cannot(what: str) -> ValueError:
    return ValueError(
        f"{what}, which tensor parallelism cannot divide: call unwrap(), load the adapter, and wrap the pipeline again"
    )


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class in ``COUNTS`` that a layer is an instance of; None if its weights are not divided."""
    return next((cls for cls in type(layer).__mro__ if cls in COUNTS), None)
