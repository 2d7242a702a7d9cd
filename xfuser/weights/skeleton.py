"""Build transformers without weights, and load only the weights that this rank keeps."""

import glob
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
import torch.distributed as dist
import transformers
from accelerate import init_empty_weights
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from xfuser.config import ParallelConfig
from xfuser.core.distributed import GroupCoordinator, get_pp_group, get_replica_group, get_tp_group, get_world_group
from xfuser.methods import tensor
from xfuser.methods.pipefusion.blocks import divide, set_tensor
from xfuser.models.registry import INDEX, components_of, is_known, plan_of, read_json
from xfuser.weights.checkpoint import Entry, Part, checked, checkpoint, kept_of, node_group, read_shared
from xfuser.weights.fsdp import Shards, free_weights, shapes_of
from xfuser.weights.placement import pipeline_split
from xfuser.weights.text_encoders import PREFIX

Place = tuple[nn.Module, str]  # a module and the name of one of its tensors

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
STEMS = {"diffusers": SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors"), "transformers": "model"}  # of weight files


def skeleton(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module returned by ``build``, with parameters on the meta device and real buffers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def component(folder: str, name: str, dtype: torch.dtype) -> nn.Module | None:
    """Build a component of a pipeline's folder without weights; None if it is not a module."""
    library, kind = components_of(folder)[name]
    cls, part = getattr(LIBRARIES.get(library), kind, None), os.path.join(folder, name)
    if not (inspect.isclass(cls) and issubclass(cls, nn.Module)):
        return None
    if library == "diffusers":
        return skeleton(lambda: cls.from_config(cls.load_config(part)), dtype)
    module = skeleton(lambda: cls(cls.config_class.from_pretrained(part)), dtype)
    module.tie_weights()  # a skeleton's parameters are not tied
    return module


class Folder(NamedTuple):
    """A pipeline's folder and the Diffusers arguments for loading it."""

    path: str
    dtypes: Any  # one dtype for all components, or a dict by name
    variant: str | None
    given: set[str]  # components not to be loaded from the folder

    def of(self, name: str) -> str:
        """The path of a component's folder."""
        return os.path.join(self.path, name)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a component is loaded in."""
        dtypes = self.dtypes
        return (dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes) or torch.float32

    def to_load(self) -> dict[str, tuple[str, str]]:
        """The components to load: library and class by name."""
        return {name: kind for name, kind in components_of(self.path).items() if name not in self.given}

    def check_class(self) -> None:
        """Raise a ValueError if the installed Diffusers lacks the pipeline's class."""
        name = read_json(os.path.join(self.path, INDEX))["_class_name"]
        if isinstance(name, str) and not hasattr(diffusers, name.removeprefix("Flax")):
            raise ValueError(f"{self.path} requires {name}, which Diffusers {diffusers.__version__} does not have")

    def check_files(self) -> None:
        """Raise a ValueError if weight files are missing or truncated."""
        for name in self.to_load():
            for stem in STEMS.values():
                checkpoint(self.of(name), stem, self.variant)

    def damage(self) -> str:
        """What is wrong with the files that are not weights; empty if they seem complete, or there is no index."""
        if not os.path.isfile(os.path.join(self.path, INDEX)):
            return ""
        for name, (_, kind) in self.to_load().items():
            if not os.path.isdir(self.of(name)):
                return f"{self.path} has no folder {name}, and {INDEX} names its class {kind}: fetch it again"
            for path in glob.glob(os.path.join(glob.escape(self.of(name)), "*.json")):
                try:
                    read_json(path, dict if path.endswith("config.json") else object)
                except ValueError as error:
                    return f"{error}: fetch it again"
        return ""

    @contextmanager
    def naming_damage(self) -> Iterator[None]:
        """Context that loads from this folder: an error is a ValueError about the damaged file, if there is one."""
        try:
            yield
        except (AttributeError, ImportError, OSError, ValueError) as error:
            if damage := self.damage():
                raise ValueError(damage) from error
            raise

    def bytes_beside(self, left_out: tuple[str, ...]) -> int:
        """Bytes of the components to load, except transformers and names that begin with one of ``left_out``."""
        size = 0
        for name, (library, kind) in self.to_load().items():
            if not name.startswith(left_out) and not is_known(getattr(diffusers, kind, object)):
                held = checkpoint(self.of(name), STEMS.get(library, ""), self.variant) or {}
                size += sum(entry.shape.numel() for entry in held.values()) * self.dtype(name).itemsize
        return size


def divided_transformers(folder: Folder, parallel: ParallelConfig) -> dict[str, "Load"]:
    """The transformers of a pipeline's folder, divided for this rank, ready to be read; every rank must call this.

    Blocks of other PipeFusion stages are stubs. Diffusers loads quantised weights and weights outside safetensors
    files. A checkpoint that does not fit its configuration, or degrees that do not fit the transformers, raise a
    ValueError on all ranks before they communicate.
    """
    loads: dict[str, Load] = {}
    for name, (library, kind) in folder.to_load().items():
        cls = getattr(diffusers, kind, None) if library == "diffusers" else None
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and is_known(cls):
            config, held = cls.load_config(folder.of(name)), checkpoint(folder.of(name), STEMS[library], folder.variant)
            if held and not config.get("quantization_config"):
                model = skeleton(partial(cls.from_config, config), folder.dtype(name))
                model.register_to_config(_name_or_path=folder.of(name))
                loads[name] = Load(model, checked(held, model.state_dict(), cls), folder.dtype(name))
    planned = {name: (load.model, load.plan) for name, load in loads.items() if load.plan}
    stages = pipeline_split(planned, f"pipeline of {folder.path}", parallel)
    for name, load in loads.items():
        load.divide(stages.get(name), parallel)
    return loads


def read(loads: dict[str, "Load"], device: torch.device) -> dict[str, nn.Module]:
    """Read the weights that this rank keeps, each tensor once per node; every rank must call this."""
    node = node_group(get_world_group(), "gloo" if device.type == "cpu" else dist.get_backend())
    for load in loads.values():
        load.run(node, device)
    node.barrier()
    node.destroy()
    return {name: load.model for name, load in loads.items()}


def freed_encoders(folder: Folder, device: torch.device) -> dict[str, nn.Module]:
    """The text encoders of a pipeline's folder without weights, for ranks that do not load them."""
    found: dict[str, nn.Module] = {}
    for name, (library, _) in folder.to_load().items():
        if name.startswith(PREFIX) and library == "transformers":
            found[name] = component(folder.path, name, folder.dtype(name))
            free_weights(found[name], device)
    return found


class Load:
    """A transformer without weights and its checkpoint: call :meth:`divide`, then :meth:`run`."""

    def __init__(self, model: nn.Module, held: dict[str, Entry], dtype: torch.dtype) -> None:
        self.model, self.plan = model, plan_of(model)
        self._held, self._dtype, self._places = held, dtype, _places(model)
        self._shards: Shards | None = None
        self._kept: dict[str, Part] = {}
        for name, weight in model.named_parameters():
            weight.data = weight.data.to(self._floating(name))

    def divide(self, layers: list[int] | None, parallel: ParallelConfig) -> None:
        """Reduce to what this rank keeps: its stage's blocks (given ``layers``, their counts) and parts of tensors."""
        parts: dict[Place, Part] = {}
        if layers:
            divide(self.model, self.plan, layers, get_pp_group().rank_in_group)
        if self.plan and parallel.tp_degree > 1:
            group = get_tp_group()
            kept = tensor.divide(self.model, self.plan, group, parallel.tensor_scheme).kept(group.rank_in_group)
            places = _places(self.model)
            parts = {places[name]: part for name, part in kept.items()}
        if self.plan and parallel.fully_shard_degree > 1:
            self._shards = Shards(self.model, get_replica_group(), self.plan, shapes_of(self.model))
            self.model = self._shards.copy
            self._places, rows = _places(self.model), self._shards.rows()
            parts = {self._places[name]: (0, (part,)) for name, part in rows.items() if part is not None}
        modules = set(self.model.modules())
        self._kept = {name: parts.get(self._places[name]) for name in self._held if self._places[name][0] in modules}

    def size(self) -> int:
        """Number of bytes that this rank keeps."""
        kept = {name: kept_of(self._held[name].shape, part) for name, part in self._kept.items()}
        return sum(shape.numel() * self._dtype_of(name).itemsize for name, shape in kept.items())

    def run(self, node: GroupCoordinator, device: torch.device) -> None:
        """Read the tensors that this rank keeps; all ranks of the node must call this."""

        def cast(name: str, x: torch.Tensor) -> torch.Tensor:
            return x.to(device, self._dtype_of(name))

        for name, x in read_shared(self._held, self._kept, node, cast):
            owner, key = self._places[name]
            if self._shards and key in owner._parameters:
                self._shards.fill(name, x)
            else:
                set_tensor(owner, key, getattr(owner, key), x)

    def _dtype_of(self, name: str) -> torch.dtype:
        stored = self._held[name].dtype
        return self._floating(name) if stored.is_floating_point else stored

    def _floating(self, name: str) -> torch.dtype:
        """The dtype in which Diffusers stores a floating-point tensor; some classes keep modules in float32."""
        precise = set(getattr(self.model, "_keep_in_fp32_modules", None) or ())
        return torch.float32 if precise & set(name.split(".")) else self._dtype


def _places(model: nn.Module) -> dict[str, Place]:
    """The owner module and local name of each tensor, by its name in checkpoints."""
    return {
        f"{prefix}.{key}" if prefix else key: (owner, key)
        for prefix, owner in model.named_modules()
        for key in (*owner._parameters, *owner._buffers)
    }
