"""xDiTParallel: the story of a wrapped call."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn

from xfuser.config import EngineConfig, InputConfig, ParallelConfig
from xfuser.core import device as devices
from xfuser.core.attention.kernels import check_backend
from xfuser.core.distributed import (
    destroy_model_parallel,
    get_cfg_group,
    get_dp_group,
    get_pp_group,
    get_replica_group,
    get_sp_group,
    get_tp_group,
    get_world_group,
    init_distributed_environment,
    initialize_model_parallel,
    launched_world_size,
    model_parallel_degrees,
    model_parallel_is_initialized,
)
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.staleness import Staleness
from xfuser.inputs import pipeline_arguments
from xfuser.logger import quiet_libraries
from xfuser.methods.cfg import GuidanceParallel
from xfuser.methods.context import ContextParallel
from xfuser.methods.data import data_parallel, split_decode
from xfuser.methods.distrifusion import DistriFusion
from xfuser.methods.forward import layered_forward, replaced
from xfuser.methods.maps import MapParallel
from xfuser.methods.naive_patch import NaivePatches
from xfuser.methods.pipefusion.blocks import divided, stage_layers
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.pipefusion.stage import Stage
from xfuser.methods.refusals import refuse_mixed_rows, refuse_offloaded, refuse_unsuited
from xfuser.methods.sequence import SequenceParallel
from xfuser.methods.sharding import Shares, shared_out, shares_of
from xfuser.methods.tensor import TensorParallel, division_of, refuse_divided
from xfuser.methods.text_encoders import TextEncoders, text_encoders
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import check_methods, planned_models
from xfuser.output import media_of, write_media
from xfuser.vae.engines import parallel_vae


class xDiTParallel:
    """A Diffusers pipeline whose calls run on all ranks, and return what the pipeline returns on one.

    The pipeline's own ``__call__`` runs on every rank. During a call, and only then, the forward of its transformer
    is shared among the ranks by the methods that ``engine_config`` asks for; the pipeline is never modified, but for
    weights that PipeFusion and tensor parallelism divide until :meth:`unwrap`. All other attributes are the pipeline's,
    to read and to set.

    Args:
        pipe: a Diffusers pipeline with a transformer that has a plan (``xfuser.models``).
        engine_config, input_config: from ``xFuserArgs.create_config()``.

    Raises:
        ValueError: the pipeline has no such transformer, or the degrees do not fit the number of ranks.
    """

    def __init__(self, pipe: Any, engine_config: EngineConfig, input_config: InputConfig | None = None) -> None:
        if isinstance(pipe, xDiTParallel):
            raise ValueError("this pipeline is wrapped already: call unwrap() on it first")
        own = self.__dict__
        own["_pipe"] = pipe
        parallel = engine_config.parallel_config
        split = pipeline_split(planned_models(pipe), type(pipe).__name__, parallel)
        _check_tensor(pipe, parallel)
        refuse_offloaded(
            _rearranged(pipe, engine_config),
            "wrap the pipeline first, then call enable_sequential_cpu_offload() or what else holds them",
        )
        if engine_config.runtime_config.use_parallel_vae and getattr(pipe, "vae", None) is None:
            raise ValueError(f"use_parallel_vae: {type(pipe).__name__} has no VAE; leave it away")
        own["_backend"] = engine_config.runtime_config.attention_backend
        check_backend(own["_backend"])
        own["engine_config"] = engine_config
        own["input_config"] = input_config or InputConfig()
        own["_output"] = None
        join_groups(engine_config)
        own["_sp"] = get_sp_group()
        own["_encoders"] = TextEncoders(pipe, engine_config.runtime_config.text_encoder, get_world_group())
        own["_shares"] = _shares(pipe, engine_config.parallel_config.fully_shard_degree)
        own["_pipefusion"] = None
        if split:
            own["_pipefusion"] = PipeFusion(
                planned_models(pipe),
                get_pp_group(),
                split,
                parallel.num_pipeline_patch,
                engine_config.runtime_config.warmup_steps,
            )
        # Behind PipeFusion, which leaves the blocks of other stages out.
        own["_tensor"] = None
        if parallel.tp_degree > 1:
            own["_tensor"] = TensorParallel(_tensor_models(pipe, parallel), get_tp_group(), parallel.tensor_scheme)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline on all ranks; every rank returns the whole result."""
        self._check_usable()
        whole = False
        if self._pipefusion:
            kwargs, whole = self._pipefusion.arguments(self._pipe, args, kwargs)
            args = ()
        with self._active(every_step_whole=whole):
            if get_world_group().world_size > 1:
                _share_randomness(kwargs.get("generator"))
            self.__dict__["_output"] = self._pipe(*args, **kwargs)
        return self._output

    def active(self) -> AbstractContextManager[None]:
        """Within the context the transformer's forward is parallel, for denoising loops of one's own too.

        With PipeFusion, the loop must go through the ``timesteps`` of the pipeline's scheduler, and step with it; each
        timestep comes once for every patch, and latents are current behind the last of them.
        """
        return self._active(every_step_whole=True)

    @contextmanager
    def _active(self, every_step_whole: bool) -> Iterator[None]:
        self._check_usable()
        with ExitStack() as stack:
            if get_world_group().world_size > 1:
                stack.enter_context(quiet_libraries())
                stack.enter_context(_quiet_progress(self._pipe))
            for context in self._vae_contexts():
                stack.enter_context(context)
            guidance = GuidanceParallel(get_cfg_group()) if get_cfg_group().world_size > 1 else None
            if guidance:
                stack.callback(guidance.close)
            models = planned_models(self._pipe)
            stages: dict[str, Stage] = {}
            if self._pipefusion:
                when_there = guidance.when_there if guidance else _at_once
                stages = stack.enter_context(self._pipefusion.active(self._pipe, models, when_there, every_step_whole))
            parts = {name: self._parts() for name in models} if self.engine_config.parallel_config.patched else {}
            for part in parts.values():
                stack.callback(part.restart)  # nothing on its way is left to the next call
            counting = [*([guidance] if guidance else []), *parts.values()]
            stack.enter_context(_before(self._pipe, "step", [one.step_ends for one in counting]))
            stack.enter_context(_before(self._pipe, "set_timesteps", [one.restart for one in parts.values()]))
            for name, (model, plan) in models.items():
                stage, part = stages.get(name), parts.get(name)
                layers = [guidance.layer(plan)] if guidance else []
                if get_dp_group().world_size > 1:
                    layers.append(data_parallel(get_dp_group(), plan))
                if layers:
                    layers.insert(0, refuse_mixed_rows(self._pipe))
                if stage:
                    layers = [stage.assembled, *layers, stage.computed]
                if part:
                    layers.insert(0, part.layer)
                if guidance and (stage or part):
                    guidance.rows_stay = True
                if guidance and stage:
                    guidance.part = stage.part
                if stage or self._sp.world_size > 1 or self._backend not in ("auto", "sdpa"):
                    if plan.context:
                        sequence = ContextParallel(model, plan, self._sp, self._backend)
                    elif plan.halvings:
                        sequence = MapParallel(model, plan, self._sp, self._backend, part)
                    else:
                        sequence = SequenceParallel(model, plan, self._sp, self._backend, stage, part)
                    layers.append(sequence.layer)
                    stack.enter_context(sequence.active())
                if layers:
                    stack.enter_context(layered_forward(model, [refuse_unsuited(model), *layers]))
            yield

    def save(self, directory: str, prefix: str = "xfuser") -> list[str]:
        """Write the last call's images (PNG), videos (MP4, or GIF without an encoder) or latents (safetensors).

        Each one is written by the first rank of the data-parallel replica that it belongs to, as
        ``{prefix}_result_{degrees}_{index}``. Returns the paths that this rank wrote.
        """
        if self._output is None:
            raise RuntimeError("there is nothing to save: call the pipeline first")
        media = media_of(self._output)
        sizes = split_sizes(len(media), get_dp_group().world_size)
        mine = share(sizes, get_dp_group().rank_in_group) if _leads_replica() else ()
        name = f"{prefix}_result_{self.engine_config.parallel_config}"
        return [write_media(media[index], directory, f"{name}_{index}") for index in mine]

    def call_arguments(self) -> dict[str, Any]:
        """The keyword arguments that ``input_config`` stands for, as this pipeline takes them."""
        return pipeline_arguments(self._pipe, self.input_config)

    def unwrap(self) -> Any:
        """Give the pipeline back; it is as it was before, and this wrapper is of no further use.

        Ranks that have parts of the weights give them to each other: all must call it, and have the memory for all.
        """
        pipe = self._pipe
        refuse_offloaded(_rearranged(pipe, self.engine_config), "call remove_all_hooks() before unwrap()")
        if self._tensor:
            self._tensor.restore()
        if self._pipefusion:
            self._pipefusion.restore()
        for name, shares in self._shares.items():
            vars(pipe)[name] = shares.restore()
        self._encoders.restore()
        self.__dict__["_pipe"] = None
        return pipe

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As the pipeline's own; refused where the wrap itself keeps weights elsewhere."""
        if self._shares or self.engine_config.runtime_config.text_encoder != "replicate":
            raise ValueError(
                "enable_sequential_cpu_offload() says where weights are, and so do fully_shard_degree and text_encoder:"
                " leave one of them away, or call enable_model_cpu_offload()"
            )
        self._pipe.enable_sequential_cpu_offload(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "xDiTParallel":
        """Move the pipeline; returns the wrapper."""
        self._pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        pipe = self.__dict__.get("_pipe")
        if pipe is None:
            raise AttributeError(f"{name}: the pipeline was unwrapped")
        return getattr(pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self._pipe, name, value)

    def _vae_contexts(self) -> list[AbstractContextManager[None]]:
        """What shares the VAE's work: images over all ranks, or, with the parallel VAE, images over replicas and the
        rows of each image over the ranks of a replica."""
        vae, runtime = getattr(self._pipe, "vae", None), self.engine_config.runtime_config
        if vae is None:
            return []
        if not runtime.use_parallel_vae:
            return [split_decode(vae, get_world_group())] if get_world_group().world_size > 1 else []
        rows = parallel_vae(
            vae, get_replica_group().device_group, runtime.vae_engine, runtime.vae_split, runtime.vae_chunk_rows
        )
        return [split_decode(vae, get_dp_group()), rows] if get_dp_group().world_size > 1 else [rows]

    def _parts(self) -> DistriFusion | NaivePatches:
        """How the ranks that compute a part of the picture each go through a loop of one transformer."""
        parallel, scheduler = self.engine_config.parallel_config, getattr(self._pipe, "scheduler", None)
        if parallel.naive_patch_degree > 1:
            return NaivePatches(parallel.split_scheme or "row")
        warmup = self.engine_config.runtime_config.warmup_steps * getattr(scheduler, "order", 1)
        return DistriFusion(Staleness(self._sp.ring_group, parallel.distrifusion_mode, warmup))

    def _check_usable(self) -> None:
        if self._pipe is None:
            raise RuntimeError("the pipeline was unwrapped: wrap it again, or call it itself")
        if self._sp is not get_sp_group():
            raise RuntimeError("the process groups were made anew since this wrap: wrap the pipeline again")


def pipeline_split(
    models: dict[str, tuple[nn.Module, ModelPlan]], pipeline: str, parallel: ParallelConfig
) -> dict[str, list[int]]:
    """Number of blocks of each stage, for each of a pipeline's transformers; empty without PipeFusion.

    Raises:
        ValueError: PipeFusion does not serve them, or their blocks are divided in another way already.
    """
    stubs = {name: divided(model, plan) for name, (model, plan) in models.items()}
    if any(stub.held for ones in stubs.values() for stub in ones):
        raise ValueError(
            f"an earlier wrap divided the blocks of this {pipeline} over stages: call unwrap() on it first"
        )
    for model, plan in models.values():
        if parallel.patched and plan.context:
            raise ValueError(
                f"DistriFusion and naive patches do not serve {type(model).__name__}: {plan.unpiped}. Use Ulysses,"
                " ring, CFG or data parallelism"
            )
        check_methods(type(model).__name__, plan, parallel.sequenced, parallel.pipelined)
    loaded_for = {name: ones[0].stage_layers for name, ones in stubs.items() if ones}
    for layers in loaded_for.values():
        if len(layers) != parallel.pp_degree or list(parallel.attn_layer_num_for_pp or layers) != layers:
            raise ValueError(
                f"this {pipeline} was loaded for stages of {layers} blocks: wrap it with the degrees that it was loaded"
                " with, or load it again"
            )
    if not parallel.pipelined:
        return {}
    if len(models) > 1:
        raise ValueError(
            f"PipeFusion does not serve {pipeline}: {' and '.join(models)} divide the steps, and the later"
            " one would begin without keys and values. Use Ulysses, ring, CFG or data parallelism"
        )
    stages, asked = parallel.pp_degree, parallel.attn_layer_num_for_pp
    return loaded_for or {name: stage_layers(model, plan, stages, asked) for name, (model, plan) in models.items()}


def _tensor_models(pipe: Any, parallel: ParallelConfig) -> list[tuple[nn.Module, ModelPlan | None]]:
    """What tensor parallelism divides: the transformers, and the text encoders where that is asked for."""
    if parallel.tp_degree == 1:
        return []
    models = list(planned_models(pipe).values())
    if parallel.tensor_parallel_text_encoder:
        encoders = text_encoders(pipe).values()
        if not encoders:
            raise ValueError(f"tensor_parallel_text_encoder: {type(pipe).__name__} has no text encoder; leave it away")
        models += [(encoder, None) for encoder in encoders]
    return models


def _check_tensor(pipe: Any, parallel: ParallelConfig) -> None:
    """Refuse what tensor parallelism cannot divide, before a process group is made."""
    asked = {id(model): plan for model, plan in _tensor_models(pipe, parallel)}
    for part in pipe.components.values():
        if not isinstance(part, nn.Module):
            continue
        if id(part) not in asked:
            refuse_divided(part)
        elif not refuse_divided(part, parallel.tp_degree, parallel.tensor_scheme):
            division_of(part, asked[id(part)], parallel.tp_degree, parallel.tensor_scheme)


def _rearranged(pipe: Any, engine_config: EngineConfig) -> list[nn.Module]:
    """The components whose weights a wrap gives other places."""
    parallel = engine_config.parallel_config
    divides = parallel.pp_degree * parallel.tp_degree * parallel.fully_shard_degree > 1
    transformers = [model for model, _ in planned_models(pipe).values()] if divides else []
    moves = engine_config.runtime_config.text_encoder != "replicate" or parallel.tensor_parallel_text_encoder
    return [*transformers, *(text_encoders(pipe).values() if moves else ())]


def _shares(pipe: Any, degree: int) -> dict[str, Shares]:
    """Shards the pipeline's transformers, unless they were loaded so."""
    found: dict[str, Shares] = {}
    for name, (model, plan) in planned_models(pipe).items():
        loaded = shares_of(model)
        if loaded and loaded.degree != degree:
            raise ValueError(
                f"this {type(pipe).__name__} was loaded for fully_shard_degree={loaded.degree}: wrap it with that"
            )
        if degree > 1:
            found[name] = loaded or shared_out(model, plan, get_replica_group())
            vars(pipe)[name] = found[name].copy  # registers nothing
    return found


def _at_once(action: Callable[[], None], results: list[Any]) -> None:
    action()


def join_groups(engine_config: EngineConfig) -> None:
    """Make the groups that the configuration asks for, or use those that are there if they are the same."""
    parallel = engine_config.parallel_config
    parallel.check(launched_world_size())
    init_distributed_environment()
    if model_parallel_is_initialized():
        if model_parallel_degrees() == parallel.group_degrees:
            return
        destroy_model_parallel()
    initialize_model_parallel(**parallel.group_degrees)


def _leads_replica() -> bool:
    groups = (get_tp_group, get_sp_group, get_pp_group, get_cfg_group)
    return all(group().is_first_rank for group in groups)


def _share_randomness(generator: Any) -> None:
    """Give every rank the random state of rank 0: of the generators passed, and of torch's default ones."""
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = get_world_group().broadcast_object((devices.rng_states(), [one.get_state() for one in generators]))
    devices.set_rng_states(states[0])
    for one, state in zip(generators, states[1], strict=True):
        one.set_state(state)


def _quiet_progress(pipe: Any) -> AbstractContextManager[None]:
    """Within the context, only rank 0 shows a progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    return replaced(
        pipe, "_progress_bar_config", before if get_world_group().is_first_rank else before | {"disable": True}
    )


def _before(pipe: Any, method: str, notify: list[Callable[[], None]]) -> AbstractContextManager[None]:
    """Within the context, ``notify`` are called ahead of a method of the pipeline's scheduler, or of a copy of it."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not notify:
        return nullcontext()
    original, of_class = getattr(scheduler, method), getattr(type(scheduler), method)

    @wraps(of_class)
    def notifying(self: Any, *args: Any, **kwargs: Any) -> Any:
        for one in notify:
            one()
        return original(*args, **kwargs) if self is scheduler else of_class(self, *args, **kwargs)

    return replaced(scheduler, method, MethodType(notifying, scheduler))  # copies get a method of their own
