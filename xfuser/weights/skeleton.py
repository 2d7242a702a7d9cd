"""Transformers that are built without weights, and get those that this rank keeps."""

import inspect
import json
import os
from collections.abc import Callable

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from xfuser.config import ParallelConfig
from xfuser.core.distributed import GroupCoordinator, get_pp_group, get_replica_group, get_tp_group, get_world_group
from xfuser.methods import tensor
from xfuser.methods.pipefusion.blocks import divide, set_tensor
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import is_known, plan_of
from xfuser.weights.checkpoint import (
    Entry,
    Part,
    backend_for,
    check_keys,
    checkpoint,
    kept_of,
    node_group,
    read_shared,
    without_ignored,
)
from xfuser.weights.fsdp import blocks_in_shares, free_weights, shares_of
from xfuser.weights.placement import pipeline_split
from xfuser.weights.text_encoders import PREFIX

Place = tuple[nn.Module, str]  # a module, and the name of one of its tensors

STEMS = {"diffusers": SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors"), "transformers": "model"}  # of weight files


def skeleton(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module that ``build`` makes, with parameters that have shapes alone; buffers are as they would be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def components_of(folder: str) -> dict[str, tuple[str, str]]:
    """The parts of a pipeline's folder that have configurations: library and class by name."""
    with open(os.path.join(folder, "model_index.json"), encoding="utf-8") as file:
        index = json.load(file)
    return {name: tuple(part) for name, part in index.items() if isinstance(part, list) and len(part) == 2 and part[0]}


def check_files(folder: str, variant: str | None) -> None:
    """Raise a ValueError for weights of a pipeline's folder that are missing or truncated."""
    for name in components_of(folder):
        for stem in STEMS.values():
            checkpoint(os.path.join(folder, name), stem, variant)


def load_transformers(
    folder: str,
    parallel: ParallelConfig,
    dtype_of: Callable[[str], torch.dtype],
    variant: str | None,
    device: torch.device,
    given: set[str],
    check_memory: Callable[[int], None],
) -> dict[str, nn.Module]:
    """The transformers of a pipeline's folder, with the weights that this rank keeps; every rank must call it.

    Blocks of other PipeFusion stages are stubs. A file is read once per node. Left to Diffusers are parts that are
    ``given``, quantised weights, and those that are not in safetensors files. ``check_memory`` is called with the bytes
    that this rank will keep, before any is read.

    Raises:
        ValueError: a checkpoint does not fit its configuration, or the degrees do not fit the transformers. All ranks
            raise it before they talk to each other.
    """
    models: dict[str, nn.Module] = {}
    held: dict[str, dict[str, Entry]] = {}
    for name, (library, kind) in components_of(folder).items():
        cls = getattr(diffusers, kind, None) if library == "diffusers" and name not in given else None
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and is_known(cls)):
            continue
        part = os.path.join(folder, name)
        config, entries = cls.load_config(part), checkpoint(part, STEMS[library], variant)
        if entries and not config.get("quantization_config"):
            models[name] = skeleton(lambda cls=cls, config=config: cls.from_config(config), dtype_of(name))
            models[name].register_to_config(_name_or_path=part)
            expected = models[name].state_dict()
            held[name] = without_ignored(entries, expected, cls)
            check_keys(held[name], expected, kind)
    for name, model in models.items():
        for key, weight in model.named_parameters():
            weight.data = weight.data.to(_dtype(model, key, dtype_of(name)))
    places = {name: _places(model) for name, model in models.items()}
    planned = {name: (model, plan) for name, model in models.items() if (plan := plan_of(model))}
    for name, layers in pipeline_split(planned, f"pipeline of {folder}", parallel).items():
        divide(*planned[name], layers, get_pp_group().rank_in_group)
    parts = {name: _divided(*planned.get(name, (model, None)), parallel) for name, model in models.items()}
    for name in planned if parallel.fully_shard_degree > 1 else ():
        models[name] = blocks_in_shares(*planned[name], get_replica_group()).copy
    loads = [_Load(model, places[name], held[name], parts[name], dtype_of(name)) for name, model in models.items()]
    check_memory(sum(load.size for load in loads))
    node = node_group(get_world_group(), backend_for(device))
    for load in loads:
        load.run(node, device)
    node.barrier()
    node.destroy()
    return models


def freed_encoders(
    folder: str, dtype_of: Callable[[str], torch.dtype], device: torch.device, given: set[str]
) -> dict[str, nn.Module]:
    """The text encoders of a pipeline's folder without weights, for ranks that leave them to another."""
    found: dict[str, nn.Module] = {}
    for name, (library, kind) in components_of(folder).items():
        if name.startswith(PREFIX) and library == "transformers" and name not in given:
            cls = getattr(transformers, kind)
            config = cls.config_class.from_pretrained(os.path.join(folder, name))
            found[name] = skeleton(lambda cls=cls, config=config: cls(config), dtype_of(name))
            found[name].tie_weights()  # a skeleton's parameters are all its own
            free_weights(found[name], device)
    return found


def _divided(model: nn.Module, plan: ModelPlan | None, parallel: ParallelConfig) -> dict[Place, Part]:
    """Divide a skeleton for tensor parallelism; of what is divided, the part that this rank keeps."""
    if not plan or parallel.tp_degree == 1:
        return {}
    division, places = tensor.divide(model, plan, get_tp_group(), parallel.tensor_scheme), _places(model)
    return {places[name]: part for name, part in division.kept(get_tp_group().rank_in_group).items()}


def _places(model: nn.Module) -> dict[str, Place]:
    """The module that has a tensor, and its name there, by the name that checkpoints have for it."""
    return {
        f"{prefix}.{key}" if prefix else key: (owner, key)
        for prefix, owner in model.named_modules()
        for key in (*owner._parameters, *owner._buffers)
    }


class _Load:
    """The weights that a skeleton gets: those of the modules that it still has; of those in ``parts``, the part."""

    def __init__(
        self,
        model: nn.Module,
        places: dict[str, Place],
        held: dict[str, Entry],
        parts: dict[Place, Part],
        dtype: torch.dtype,
    ) -> None:
        self._model, self._held, self._dtype = model, held, dtype
        self._shares, modules = shares_of(model), set(model.modules())
        if self._shares:
            places = _places(model)
            rows = self._shares.rows()
            parts = {places[name]: (0, (part,)) for name, part in rows.items() if part is not None}
        self._places = places
        self._kept = {name: parts.get(places[name]) for name in held if places[name][0] in modules}

    @property
    def size(self) -> int:
        """Bytes of it."""
        return sum(
            kept_of(self._held[name].shape, part).numel() * self._dtype_of(name).itemsize
            for name, part in self._kept.items()
        )

    def run(self, node: GroupCoordinator, device: torch.device) -> None:
        """Read and put them in their places; all ranks of the node must call it."""

        def cast(name: str, x: torch.Tensor) -> torch.Tensor:
            return x.to(device, self._dtype_of(name))

        for name, x in read_shared(self._held, self._kept, node, cast):
            owner, key = self._places[name]
            if self._shares and key in owner._parameters:
                self._shares.fill(name, x)
            else:
                set_tensor(owner, key, getattr(owner, key), x)

    def _dtype_of(self, name: str) -> torch.dtype:
        stored = self._held[name].dtype
        return _dtype(self._model, name, self._dtype) if stored.is_floating_point else stored


def _dtype(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """What Diffusers stores a tensor in: some parts of some classes stay precise."""
    precise = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return torch.float32 if precise & set(name.split(".")) else dtype
