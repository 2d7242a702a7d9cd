"""Placement of a wrapped pipeline's weights: divided by PipeFusion, tensor parallelism or FSDP."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from xfuser.config import EngineConfig, ParallelConfig
from xfuser.core import distributed as groups
from xfuser.core.hooks import replaced
from xfuser.methods.cache.added import check_cache
from xfuser.methods.pipefusion.blocks import divided, stage_layers
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.refusals import refusal, refuse_changed, refuse_offloaded, refuse_quantised
from xfuser.methods.tensor import TensorParallel, division_of, refuse_divided
from xfuser.models.plan import ModelPlan, attentions_of
from xfuser.models.registry import check_methods, planned_models
from xfuser.weights.fsdp import Shards, freed_by_wrap, is_freed, shard, shards_of
from xfuser.weights.text_encoders import TextEncoders, text_encoders


class Placement:
    """The weights of a pipeline, divided as configured until :meth:`restore`.

    Creates the process groups of the configuration, or reuses existing ones of the same degrees. If the configuration
    does not fit the pipeline or the number of ranks, raises a ValueError before any group is created.
    """

    def __init__(self, pipe: Any, engine_config: EngineConfig) -> None:
        self._pipe, self._engine = pipe, engine_config
        parallel, runtime = engine_config.parallel_config, engine_config.runtime_config
        for freed in filter(is_freed, (model for model, _ in planned_models(pipe).values())):
            raise ValueError(freed_by_wrap(freed))
        refuse_quantised(self._rearranged())
        advice = "wrap the pipeline first, then call enable_sequential_cpu_offload() or another offload"
        refuse_offloaded(self._rearranged(), advice)
        stages = pipeline_split(planned_models(pipe), type(pipe).__name__, parallel)
        _check_tensor(pipe, parallel)
        check_cache(pipe, engine_config)
        join_groups(engine_config)
        self._world = groups.get_world_group()
        self._encoders = TextEncoders(pipe, runtime.text_encoder, self._world)
        self._shards = _shards(pipe, parallel.fully_shard_degree)
        self.pipefusion = PipeFusion(pipe, groups.get_pp_group(), stages) if stages else None
        self._tensor: TensorParallel | None = None
        if parallel.tp_degree > 1:  # after PipeFusion, which removes other stages' blocks
            models, group = _tensor_models(pipe, parallel), groups.get_tp_group()
            self._tensor = TensorParallel(models, group, parallel.tensor_scheme, pipe)
        if self.pipefusion:
            self.pipefusion.remember()
        self._encoders.place()  # last, as what precedes may refuse the transformers
        self._guards = ExitStack()
        if parallel.pp_degree > 1:
            for model, _ in planned_models(pipe).values():
                message = "caches hook all blocks, and this stage has some: call it before the wrap, or use_fbcache"
                self._guards.enter_context(replaced(model, "enable_cache", refusal(f"enable_cache: {message}")))
        if parallel.tp_degree * parallel.fully_shard_degree > 1 and hasattr(pipe, "load_ip_adapter"):
            message = "this rank has a part of the transformer's weights: call it before the wrap, or unwrap() first"
            self._guards.enter_context(replaced(pipe, "load_ip_adapter", refusal(f"load_ip_adapter: {message}")))
        for module in self._rearranged():
            if not hasattr(module, "save_pretrained") or "save_pretrained" in vars(module):  # another wrap refuses it
                continue
            problem = f"this rank has a part of the weights of {type(module).__name__}"
            advice = "call save_pretrained() of the wrapped pipeline, on all ranks, or unwrap() first"
            self._guards.enter_context(replaced(module, "save_pretrained", refusal(f"{problem}: {advice}")))

    def restore(self) -> None:
        """Restore all weights on each rank; all ranks must call this, with memory for them.

        If blocks were changed so that other ranks cannot get them, all ranks raise a ValueError, and nothing is done.
        """
        refuse_offloaded(self._rearranged(), "call remove_all_hooks() before unwrap()")
        if self.pipefusion and (problems := list(filter(None, self._world.all_gather_object(self.pipefusion.check())))):
            problem = f"blocks were changed since the wrap, and other PipeFusion stages cannot get them ({problems[0]})"
            raise ValueError(f"{problem}: undo the change first, or make it before the wrap")
        divided = [*([self._tensor] if self._tensor else []), *self._shards.values()]
        divided += [self._encoders] if self._engine.runtime_config.text_encoder == "shard" else []
        if divided:
            refuse_changed([change for one in divided for change in one.changes()], self._world)
        self._guards.close()  # first, as they may wrap the methods restored below
        if self._tensor:
            self._tensor.restore()
        if self.pipefusion:
            self.pipefusion.restore()
        for name, shards in self._shards.items():
            shards.put_back(self._pipe, name)
        self._encoders.restore()

    @property
    def divided(self) -> bool:
        """Whether this rank may lack some of the weights."""
        return bool(self._rearranged())

    @property
    def keeps_elsewhere(self) -> bool:
        """Whether this placement itself moves weights to and from the device."""
        return bool(self._shards) or self._engine.runtime_config.text_encoder != "replicate"

    def _rearranged(self) -> list[nn.Module]:
        """The components whose weights are moved or divided."""
        parallel = self._engine.parallel_config
        transformers = [model for model, _ in planned_models(self._pipe).values()] if parallel.divides else []
        moves = self._engine.runtime_config.text_encoder != "replicate" or parallel.tensor_parallel_text_encoder
        return [*transformers, *(text_encoders(self._pipe).values() if moves else ())]


def join_groups(engine_config: EngineConfig) -> None:
    """Create the process groups of the configuration, or reuse existing ones of the same degrees."""
    parallel = engine_config.parallel_config
    parallel.check(groups.launched_world_size())
    groups.init_distributed_environment()
    if groups.model_parallel_is_initialized():
        if groups.model_parallel_degrees() == parallel.group_degrees:
            return
        groups.destroy_model_parallel()
    groups.initialize_model_parallel(**parallel.group_degrees)


def pipeline_split(
    models: dict[str, tuple[nn.Module, ModelPlan]], pipeline: str, parallel: ParallelConfig
) -> dict[str, list[int]]:
    """Number of blocks of each stage, for each of a pipeline's transformers; empty without PipeFusion.

    Raises a ValueError if a method does not support them, or if their blocks are already divided in another way.
    """
    stubs = {name: divided(model, plan) for name, (model, plan) in models.items()}
    if any(stub.held for ones in stubs.values() for stub in ones):
        raise ValueError(
            f"an earlier wrap divided the blocks of this {pipeline} over stages: call unwrap() on it first"
        )
    for model, plan in models.values():
        _check_methods(model, plan, parallel)
    loaded_for = {name: ones[0].stage_layers for name, ones in stubs.items() if ones}
    stages, asked = parallel.pp_degree, parallel.attn_layer_num_for_pp
    for layers in loaded_for.values():
        if len(layers) != stages or list(asked or layers) != layers:
            problem = f"this {pipeline} was loaded for stages of {layers} blocks"
            raise ValueError(f"{problem}: wrap it with the degrees that it was loaded with, or load it again")
    if not parallel.pipelined:
        return {}
    return loaded_for or {name: stage_layers(model, plan, stages, asked) for name, (model, plan) in models.items()}


def _check_methods(model: nn.Module, plan: ModelPlan, parallel: ParallelConfig) -> None:
    kind = type(model).__name__
    check_methods(kind, plan, parallel.sequenced, parallel.pipelined, parallel.patched)
    if parallel.sequenced or parallel.pipelined or parallel.patched:
        attentions_of(model, plan)  # raises for blocks of another layout


def _tensor_models(pipe: Any, parallel: ParallelConfig) -> list[tuple[nn.Module, ModelPlan | None]]:
    """The modules that tensor parallelism divides: the transformers, and the text encoders if configured."""
    if parallel.tp_degree == 1:
        return []
    encoders = text_encoders(pipe).values() if parallel.tensor_parallel_text_encoder else ()
    if parallel.tensor_parallel_text_encoder and not encoders:
        raise ValueError(f"tensor_parallel_text_encoder: {type(pipe).__name__} has no text encoder; remove it")
    return [*planned_models(pipe).values(), *((encoder, None) for encoder in encoders)]


def _check_tensor(pipe: Any, parallel: ParallelConfig) -> None:
    """Raise a ValueError for modules that tensor parallelism cannot divide, before a process group is created."""
    plans = {id(model): plan for model, plan in _tensor_models(pipe, parallel)}
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            if id(part) not in plans:
                refuse_divided(part)
            elif not refuse_divided(part, parallel.tp_degree, parallel.tensor_scheme):
                division_of(part, plans[id(part)], parallel.tp_degree, parallel.tensor_scheme)


def _shards(pipe: Any, degree: int) -> dict[str, Shards]:
    """Shard the pipeline's transformers, unless they were loaded as shards."""
    found: dict[str, Shards] = {}
    for name, (model, plan) in planned_models(pipe).items():
        loaded = shards_of(model)
        if loaded and loaded.degree != degree:
            kind = type(pipe).__name__
            raise ValueError(f"this {kind} was loaded for fully_shard_degree={loaded.degree}: wrap it with that")
        if degree > 1:
            found[name] = loaded or shard(model, plan, groups.get_replica_group())
            vars(pipe)[name] = found[name].copy  # without registering a component
    return found
