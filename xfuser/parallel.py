"""xDiTParallel: wraps a pipeline and runs its calls on all ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from xfuser.call import CallState
from xfuser.config import EngineConfig, InputConfig, checked_config
from xfuser.core.attention.kernels import TORCHS_CHOICE, check_backend
from xfuser.core.distributed import (
    get_cfg_group,
    get_dp_group,
    get_pp_group,
    get_replica_group,
    get_sp_group,
    get_tp_group,
    get_world_group,
)
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.hooks import Binder
from xfuser.core.logger import quiet_libraries
from xfuser.methods.cache.caching import cache_methods
from xfuser.methods.cache.use import CacheUse
from xfuser.methods.cfg import GuidanceParallel
from xfuser.methods.compiled import CompiledBlocks, uncompiled
from xfuser.methods.context import ContextParallel
from xfuser.methods.data import DataParallel, split_decode
from xfuser.methods.distrifusion import DistriFusion
from xfuser.methods.naive_patch import NaivePatches
from xfuser.methods.progress import quiet_progress
from xfuser.methods.refusals import Refusals, refusal
from xfuser.methods.sequence import SequenceParallel
from xfuser.methods.stacks import stacks_of
from xfuser.methods.unet.maps import MapParallel
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import planned_models, set_plan
from xfuser.pipeline_io.agreement import shared_arguments
from xfuser.pipeline_io.arguments import pipeline_arguments
from xfuser.pipeline_io.media import media_of, write_media
from xfuser.vae.engines import parallel_vae
from xfuser.weights.placement import Placement
from xfuser.weights.text_encoders import text_encoders


class Method(Protocol):
    """One way to divide the work of a call's forwards."""

    def enter(self, call: CallState) -> None:
        """Register wrappers and callbacks with the call, and enter contexts on it, that divide its forwards."""


class xDiTParallel:
    """A Diffusers pipeline whose calls run on all ranks, and return what the pipeline returns on one rank.

    The pipeline's own ``__call__`` runs on every rank. During a call, and only then, the forward of its transformer
    is divided among the ranks by the methods that ``engine_config`` selects. The pipeline is not modified, except for
    weights that PipeFusion and tensor parallelism divide until :meth:`unwrap`. All other attributes are read from and
    set on the pipeline.

    Args:
        pipe: a Diffusers pipeline with a transformer that has a plan (``xfuser.models``).
        engine_config, input_config: from ``xFuserArgs.create_config()``.

    Raises:
        ValueError: the pipeline has no such transformer, or the degrees do not fit the number of ranks.

    Attributes:
        cache_use: counts of block computations that caches ran and skipped in the last call.
    """

    __reduce_ex__ = refusal("a wrapped pipeline cannot be copied or pickled: copy the pipeline that unwrap() returns")

    def __init__(self, pipe: Any, engine_config: EngineConfig, input_config: InputConfig | None = None) -> None:
        if isinstance(pipe, xDiTParallel):
            raise ValueError("this pipeline is wrapped already: call unwrap() on it first")
        runtime = checked_config(engine_config).runtime_config
        if runtime.use_parallel_vae and getattr(pipe, "vae", None) is None:
            raise ValueError(f"use_parallel_vae: {type(pipe).__name__} has no VAE; remove it")
        check_backend(runtime.attention_backend)
        own = vars(self)  # other attributes are the pipeline's
        own.update(_pipe=pipe, engine_config=engine_config, input_config=input_config or InputConfig())
        own.update(_backend=runtime.attention_backend, _output=None, cache_use=CacheUse(), _blocks={})
        own["_compiler"] = torch.compile if runtime.use_torch_compile else None
        with ExitStack() as stack:
            self._take_out_compiled(stack)
            self._place()
            own["_compiled"] = stack.pop_all()
        own["_sp"] = get_sp_group()

    def _place(self) -> None:
        """Place the weights as the configuration requires."""
        placement = Placement(self._pipe, self.engine_config)
        vars(self).update(_placement=placement, _pipefusion=placement.pipefusion)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline on all ranks; every rank returns the full result."""
        self._check_usable()
        arguments = Binder(self._pipe.__call__)(args, kwargs)
        call = self._new_call()
        if self._pipefusion:
            args, kwargs = (), self._pipefusion.arguments(arguments, call)
        with self._running(call):
            if get_world_group().world_size > 1:
                args, kwargs = shared_arguments(args, kwargs)
            self._output = self._pipe(*args, **kwargs)
        return self._output

    def active(self) -> AbstractContextManager[None]:
        """Within the context, the transformer's forward is parallel, including in a denoising loop of the caller.

        With PipeFusion, the loop must iterate over the ``timesteps`` of the pipeline's scheduler and call its ``step``.
        Each timestep occurs once per patch, and the latents are current after the last patch.
        """
        self._check_usable()
        return self._running(self._new_call())

    def _new_call(self) -> CallState:
        order = getattr(getattr(self._pipe, "scheduler", None), "order", 1)
        warmup = self.engine_config.runtime_config.warmup_steps * order
        patches = self.engine_config.parallel_config.num_pipeline_patch if self._pipefusion else 1
        return CallState(patches, warmup, self._compiler is not None)

    @contextmanager
    def _running(self, call: CallState) -> Iterator[None]:
        """Within the context, the forwards of this call's transformers are divided."""
        with call:
            if get_world_group().world_size > 1:
                call.enter_context(quiet_libraries())
                quiet_progress(call, self._pipe)
            self._take_out_compiled(call)
            self._divide_vae(call)
            for method in self._methods():
                method.enter(call)
            call.wrap(getattr(self._pipe, "scheduler", None))
            yield

    def _take_out_compiled(self, stack: ExitStack) -> None:
        """Replace compiled components by their originals until the stack closes; compile their blocks from now on."""
        self._compiler = uncompiled(stack, self._pipe, self._taking_part()) or self._compiler

    def _methods(self) -> list[Method]:
        """The methods that divide this call's forwards, in the order of their wrappers, the outermost first."""
        models, parallel = planned_models(self._pipe, bool(self._pipefusion)), self.engine_config.parallel_config
        parts = {name: self._part_of(model) for name, (model, _) in models.items()} if parallel.patched else {}
        self.cache_use = CacheUse()
        added, caches = cache_methods(self._pipe, models.values(), self.engine_config, self.cache_use)
        methods: list[Method] = [self._pipefusion] if self._pipefusion else list(parts.values())
        if parallel.cfg_degree > 1:
            entries_stay = parallel.patched or bool(self._pipefusion) or bool(caches)
            methods.append(GuidanceParallel(get_cfg_group(), models.values(), entries_stay, self._pipe))
        if parallel.dp_degree > 1:
            methods.append(DataParallel(get_dp_group(), models.values(), self._pipe))
        if self._pipefusion or self._sp.world_size > 1 or self._backend not in TORCHS_CHOICE:
            methods += [self._sequence(model, plan, parts.get(name)) for name, (model, plan) in models.items()]
        if self._pipefusion:
            methods += stacks_of(self._pipe, models.values(), self._sp, self._backend, self._pipefusion)
        if methods:
            methods.insert(0, Refusals([model for model, _ in models.values()]))
        compiled = self._compiled_blocks(models) if self._compiler else []  # the blocks' own code, inside all hooks
        return [*added, *compiled, *caches, *methods]

    def _compiled_blocks(self, models: dict[str, tuple[nn.Module, ModelPlan]]) -> list[Method]:
        """The compiled blocks of each transformer, which are kept as long as the pipeline has it."""
        known, shared = self._blocks, (self._compiler, self._pipe)
        self._blocks = {one: known.get(one) or CompiledBlocks(one, plan, *shared) for one, plan in models.values()}
        return list(self._blocks.values())

    def _sequence(self, model: nn.Module, plan: ModelPlan, part: DistriFusion | NaivePatches | None) -> Method:
        """The method that shards the tokens, or the rows of a U-Net's maps."""
        if plan.context:
            return ContextParallel(model, plan, self._sp, self._backend)
        if not plan.blocks:
            return MapParallel(model, plan, self._sp, self._backend, part)
        return SequenceParallel(model, plan, self._sp, self._backend, self._pipefusion, part)

    def _part_of(self, model: nn.Module) -> DistriFusion | NaivePatches:
        """The method by which each rank computes a part of the image: naive patches or DistriFusion."""
        parallel = self.engine_config.parallel_config
        if parallel.naive_patch_degree > 1:
            return NaivePatches(parallel.split_scheme or "row")
        return DistriFusion(model, self._sp.ring_group, parallel.distrifusion_mode)

    def save(self, directory: str, prefix: str = "xfuser") -> list[str]:
        """Write the last call's images (PNG), videos (MP4, or GIF without an encoder) or latents (safetensors).

        The first rank of the data-parallel replica that an item belongs to writes it as
        ``{prefix}_result_{degrees}_{index}``. Returns the paths that this rank wrote.
        """
        if self._output is None:
            raise RuntimeError("there is nothing to save: call the pipeline first")
        media = media_of(self._output)
        sizes = split_sizes(len(media), get_dp_group().world_size)
        leads = all(group().is_first_rank for group in (get_tp_group, get_sp_group, get_pp_group, get_cfg_group))
        mine = share(sizes, get_dp_group().rank_in_group) if leads else ()
        name = f"{prefix}_result_{self.engine_config.parallel_config}"
        return [write_media(media[index], directory, f"{name}_{index}") for index in mine]

    def call_arguments(self) -> dict[str, Any]:
        """``input_config`` as keyword arguments of this pipeline's call."""
        return pipeline_arguments(self._pipe, self.input_config)

    def unwrap(self) -> Any:
        """Return the pipeline as it was before the wrap; this wrapper cannot be used afterwards.

        Ranks that hold shards of the weights gather them: all ranks must call it, with memory for the full weights.
        """
        if self._pipe is None:
            raise RuntimeError("the pipeline was unwrapped already")
        self._placement.restore()
        self._compiled.close()
        pipe, self._pipe = self._pipe, None
        return pipe

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Call the pipeline's ``save_pretrained`` with the full weights.

        Where ranks hold shards of the weights, all must call it, with memory for the full weights, as for
        :meth:`unwrap`: the first rank writes the files, and then each rank goes back to its shard.
        """
        self._check_usable()
        if not self._placement.divided:
            self._pipe.save_pretrained(*args, **kwargs)
            return
        world, written = get_world_group(), False
        self._placement.restore()
        try:
            if world.is_first_rank:
                self._pipe.save_pretrained(*args, **kwargs)
            written = True
        finally:
            written = world.broadcast_object(written)
            self._place()
        if not written:
            raise RuntimeError("save_pretrained() failed on the first rank, which reports the cause")

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Call the pipeline's method; raise a ValueError where the wrap itself moves weights."""
        if self._placement.keeps_elsewhere:
            raise ValueError(
                "enable_sequential_cpu_offload() excludes fully_shard_degree and text_encoder, which also move weights:"
                " remove one of them, or call enable_model_cpu_offload()"
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

    def _divide_vae(self, call: CallState) -> None:
        """Divide the VAE's work: images over all ranks, or, with the parallel VAE, images over replicas, and the rows
        of each image over the ranks of a replica."""
        vae, runtime = getattr(self._pipe, "vae", None), self.engine_config.runtime_config
        if vae is None:
            return
        images = get_dp_group() if runtime.use_parallel_vae else get_world_group()
        if images.world_size > 1:
            call.enter_context(split_decode(vae, images))
        if runtime.use_parallel_vae:
            how = runtime.vae_engine, runtime.vae_split, runtime.vae_chunk_rows
            call.enter_context(parallel_vae(vae, get_replica_group().device_group, *how))

    def _taking_part(self) -> list[str]:
        """The components whose forward or weights are divided."""
        parallel, runtime = self.engine_config.parallel_config, self.engine_config.runtime_config
        moves = runtime.text_encoder != "replicate" or parallel.tensor_parallel_text_encoder
        encoders = list(text_encoders(self._pipe)) if moves else []
        models = list(planned_models(self._pipe))
        named = self._backend not in TORCHS_CHOICE
        engaged = self.engine_config.world_size > 1 or parallel.pipelined or named or self._compiler is not None
        return models + encoders if engaged else encoders

    def _check_usable(self) -> None:
        if self._pipe is None:
            raise RuntimeError("the pipeline was unwrapped: wrap it again, or call the pipeline itself")
        if self._sp is not get_sp_group():
            raise RuntimeError("the process groups were replaced after this wrap: wrap the pipeline again")


class Loop:
    """A transformer and the optional scheduler of the caller's loop, with the interface of a pipeline."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, as in a pipeline."""
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def parallelize(
    transformer: nn.Module, plan: ModelPlan | None, engine_config: EngineConfig, scheduler: Any = None
) -> xDiTParallel:
    """Make a transformer's forward parallel, only within ``with parallelize(...).active():``.

    Args:
        transformer: any module built of blocks that a plan can describe; the same weights on every rank.
        plan: the plan of this transformer; None if its class is registered with a plan.
        engine_config: from ``xFuserArgs.create_config()``.
        scheduler: a Diffusers scheduler. PipeFusion, DistriFusion and guidance with two calls per step use it to
            detect the end of a step. Within ``active()``, use the returned object's ``parallel.scheduler``.

    Raises:
        ValueError: no plan exists, or the degrees do not fit the plan or the number of ranks.
    """
    if plan is not None:
        set_plan(transformer, plan)
    parallel = checked_config(engine_config).parallel_config
    if scheduler is None and (parallel.pipelined or parallel.patched):
        raise ValueError(
            "PipeFusion, DistriFusion and naive patches need the scheduler's steps: give parallelize() the scheduler"
        )
    return xDiTParallel(Loop(transformer, scheduler), engine_config)
