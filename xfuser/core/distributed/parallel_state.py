"""The process groups of this process: set once, available everywhere; getters raise if they are not set.

Ranks are laid out with tensor parallelism innermost, then Ulysses, ring, PipeFusion, CFG, and data parallelism
outermost, so that the methods that communicate most do so between neighbouring ranks:

    rank = ((((dp * CFG + cfg) * PP + pp) * RING + ring) * ULYSSES + ulysses) * TP + tp
"""

import importlib.util
import math
import os
from collections.abc import Callable

import torch.distributed as dist

from xfuser.core import device as devices
from xfuser.core.checks import check_count
from xfuser.core.distributed.ending import TIME_LIMIT, end_at_exit, end_group, is_made_here, made_here
from xfuser.core.distributed.environment import check_group_backend, check_place, launched, node_rank
from xfuser.core.distributed.failure import fail_together
from xfuser.core.distributed.group_coordinator import GroupCoordinator, SequenceParallelGroupCoordinator
from xfuser.core.distributed.utils import DEFAULT_ORDER, RankGenerator, split_sequence_group
from xfuser.core.logger import logger

_groups: dict[str, GroupCoordinator] = {}


def _group(name: str) -> GroupCoordinator:
    if name not in _groups:
        raise RuntimeError(
            f"the {name} group is not initialised: call, on every rank and in this order,\n"
            "    xfuser.core.distributed.init_distributed_environment()\n"
            "    xfuser.core.distributed.initialize_model_parallel(ulysses_degree=..., ring_degree=...)\n"
            "xDiTParallel does both"
        )
    return _groups[name]


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
) -> None:
    """Join or start the default process group, and make the world group.

    A process group that exists already is joined: ``world_size`` and ``rank`` must then match it, or be left out.
    Otherwise one is started from the arguments, from torchrun's environment or, without either, for this process only.
    ``backend`` defaults to the device's.

    Raises:
        ValueError: the arguments, or the variables of the environment, are no rank of a world.
    """
    check_place(world_size, rank, local_rank)
    check_group_backend(backend)
    there = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else None
    if there and (world_size not in (-1, there[0]) or rank not in (-1, there[1])):
        raise ValueError(
            f"world_size={world_size}, rank={rank}: the process group that is there has {there[0]} ranks, and this is"
            f" rank {there[1]}; pass these values, or neither"
        )
    if "world" in _groups:
        return
    reads_environment = not there and world_size == rank == -1 and distributed_init_method == "env://"
    alone = reads_environment and launched() == (1, 0) and "RANK" not in os.environ
    local_rank = node_rank(local_rank, rank)
    fail_together()
    end_at_exit(destroy_distributed_environment)
    devices.use(local_rank)  # before anything may touch a device
    if not there:
        kind = backend or devices.backend()
        place = {"init_method": distributed_init_method, "world_size": world_size, "rank": rank}
        if alone:
            place = {"store": dist.HashStore(), "world_size": 1, "rank": 0}
        dist.init_process_group(kind, **place, timeout=TIME_LIMIT, **devices.group_options(local_rank, kind))
        made_here(dist.group.WORLD)
    ranks = list(range(dist.get_world_size()))
    _groups["world"] = GroupCoordinator([ranks], local_rank, backend or dist.get_backend())


def launched_world_size() -> int:
    """Number of ranks in the world or team, or in the world that :func:`init_distributed_environment` would start."""
    if "world" in _groups:
        return _groups["world"].world_size
    return dist.get_world_size() if dist.is_initialized() else launched()[0]


def initialize_model_parallel(
    data_parallel_degree: int = 1,
    classifier_free_guidance_degree: int = 1,
    sequence_parallel_degree: int | None = None,
    ulysses_degree: int = 1,
    ring_degree: int = 1,
    tensor_parallel_degree: int = 1,
    pipeline_parallel_degree: int = 1,
    vae_parallel_size: int = 0,
    backend: str | None = None,
) -> None:
    """Make the groups of every kind of parallelism; the product of the degrees must be the size of the world or team.

    ``sequence_parallel_degree`` is ``ulysses_degree * ring_degree`` and may be left out. If it has another value, the
    first of these that matches the world size is used: the degrees as given (some callers pass ``ulysses_degree`` as
    this value), or one that is 1 (Ulysses first) raised so that their product is this value.

    ``vae_parallel_size`` must be 0: no ranks are only for the VAE, and ``use_parallel_vae`` uses all of a replica.

    If yunchang is installed, its own registry is set to the Ulysses and ring groups.

    Raises:
        RuntimeError: the world group does not exist yet, or the groups exist already.
        ValueError: no interpretation of the degrees matches the world size, or a value is not allowed.
    """
    world = get_world_group()
    if model_parallel_is_initialized():
        raise RuntimeError("the parallel groups are initialised already: call destroy_model_parallel() first")
    if isinstance(vae_parallel_size, str):  # older scripts pass the backend as the eighth argument
        vae_parallel_size, backend = 0, vae_parallel_size
    check_group_backend(backend)
    given = {
        "data_parallel_degree": data_parallel_degree,
        "classifier_free_guidance_degree": classifier_free_guidance_degree,
        "sequence_parallel_degree": 1 if sequence_parallel_degree is None else sequence_parallel_degree,
        "ulysses_degree": ulysses_degree,
        "ring_degree": ring_degree,
        "tensor_parallel_degree": tensor_parallel_degree,
        "pipeline_parallel_degree": pipeline_parallel_degree,
    }
    for name, degree in given.items():
        check_count(name, degree)
    if vae_parallel_size:
        raise ValueError(f"vae_parallel_size={vae_parallel_size!r} must be 0: use_parallel_vae divides the VAE's work")
    degrees = {
        "tp": tensor_parallel_degree,
        "sp": ulysses_degree * ring_degree,
        "pp": pipeline_parallel_degree,
        "cfg": classifier_free_guidance_degree,
        "dp": data_parallel_degree,
    }
    if sequence_parallel_degree not in (None, degrees["sp"]):
        wanted = world.world_size * degrees["sp"] / math.prod(degrees.values())
        ulysses_degree, ring_degree = _understood(sequence_parallel_degree, ulysses_degree, ring_degree, wanted)
        degrees["sp"] = ulysses_degree * ring_degree
    grids = [RankGenerator(**degrees, order=DEFAULT_ORDER, rank_offset=team[0]) for team in world.group_ranks]
    if grids[0].world_size != world.world_size:
        raise ValueError(f"the product of {degrees} is {grids[0].world_size}, the world has {world.world_size} ranks")
    backend = backend or dist.get_backend()

    def ranks_of(token: str) -> list[list[int]]:
        return [ranks for grid in grids for ranks in grid.get_ranks(token)]

    tokens = {"dp": "dp", "cfg": "cfg", "pp": "pp", "tp": "tp", "replica": "tp-sp-pp-cfg"}
    tokens |= {"forward": "tp-sp-cfg-dp"} if degrees["pp"] > 1 else {}
    tokens |= {"branch": "tp-sp-dp"} if degrees["cfg"] > 1 else {}
    for name, token in tokens.items():
        _groups[name] = GroupCoordinator(ranks_of(token), world.local_rank, backend)
    split = [split_sequence_group(ranks, ulysses_degree) for ranks in ranks_of("sp")]
    _groups["sp"] = SequenceParallelGroupCoordinator(
        ranks_of("sp"),
        world.local_rank,
        backend,
        ulysses_ranks=[ranks for ulysses, _ in split for ranks in ulysses],
        ring_ranks=[ranks for _, ring in split for ranks in ring],
    )
    _tell_yunchang(_groups["sp"].ulysses_group, _groups["sp"].ring_group)
    dist.barrier(group=world.cpu_group)  # without it, a rank could exit before others have connected to its groups


def _understood(sequence: int, ulysses: int, ring: int, wanted: float) -> tuple[int, int]:
    """The Ulysses and ring degree intended by a ``sequence_parallel_degree`` that is not their product."""
    readings = [(ulysses, ring)]
    if ulysses == 1:
        readings.append((sequence // ring, ring))
    if ring == 1:
        readings.append((ulysses, sequence // ulysses))
    for reading in readings:
        if math.prod(reading) == wanted:
            if wanted != sequence:
                logger.warning(
                    "sequence_parallel_degree=%d is not used: ulysses_degree=%d * ring_degree=%d match the number of"
                    " ranks", sequence, *reading,
                )  # fmt: skip
            return reading
    raise ValueError(
        f"sequence_parallel_degree={sequence} must be ulysses_degree={ulysses} * ring_degree={ring}, and all degrees"
        f" must multiply to the number of ranks, which leaves {wanted:g} for the sequence: give two numbers with that"
        " product as ulysses_degree and ring_degree"
    )


def _tell_yunchang(ulysses: dist.ProcessGroup | None, ring: dist.ProcessGroup | None) -> None:
    """Set the registry from which yunchang's own layers take their groups."""
    if importlib.util.find_spec("yunchang") is None:
        return
    try:
        from yunchang.globals import PROCESS_GROUP
    except (ImportError, RuntimeError) as error:  # its import queries the accelerator for kernels
        logger.warning("yunchang cannot be imported, and its own layers will find no groups: %s", error)
        return
    PROCESS_GROUP.ULYSSES_PG, PROCESS_GROUP.RING_PG = ulysses, ring


def model_parallel_is_initialized() -> bool:
    """Whether the groups of :func:`initialize_model_parallel` exist."""
    return "sp" in _groups


def model_parallel_degrees() -> dict[str, int]:
    """The degrees of the existing groups, by the argument names of :func:`initialize_model_parallel`."""
    return {
        "data_parallel_degree": get_dp_group().world_size,
        "classifier_free_guidance_degree": get_cfg_group().world_size,
        "ulysses_degree": get_sp_group().ulysses_world_size,
        "ring_degree": get_sp_group().ring_world_size,
        "tensor_parallel_degree": get_tp_group().world_size,
        "pipeline_parallel_degree": get_pp_group().world_size,
    }


def destroy_model_parallel() -> None:
    """Release all groups except the world's; :func:`initialize_model_parallel` may then make new ones."""
    if model_parallel_is_initialized():
        _tell_yunchang(None, None)
    for name in [name for name in _groups if name != "world"]:
        _groups.pop(name).destroy()


def destroy_distributed_environment() -> None:
    """Release every group, and the default process group if :func:`init_distributed_environment` started it."""
    destroy_model_parallel()
    if "world" in _groups:
        _groups.pop("world").destroy()
    if is_made_here(dist.group.WORLD):
        end_group(dist.group.WORLD)


def get_world_group() -> GroupCoordinator:
    """All ranks."""
    return _group("world")


def get_dp_group() -> GroupCoordinator:
    """The ranks at the same position in each data-parallel replica."""
    return _group("dp")


def get_replica_group() -> GroupCoordinator:
    """All ranks of one data-parallel replica."""
    return _group("replica")


def get_cfg_group() -> GroupCoordinator:
    """The ranks that share the branches of classifier-free guidance."""
    return _group("cfg")


def get_forward_group() -> GroupCoordinator:
    """The ranks that compute the same blocks of a forward: those of one pipeline stage, or all without a pipeline."""
    return _groups.get("forward") or get_world_group()


def get_branch_group() -> GroupCoordinator:
    """The ranks of :func:`get_forward_group` that compute the same branch of guidance."""
    return _groups.get("branch") or get_forward_group()


def get_sp_group() -> SequenceParallelGroupCoordinator:
    """The ranks that share one sequence."""
    return _group("sp")


def get_pp_group() -> GroupCoordinator:
    """The stages of one pipeline."""
    return _group("pp")


def get_tp_group() -> GroupCoordinator:
    """The ranks that share the weights of one layer."""
    return _group("tp")


def _size_and_rank(
    group: Callable[[], GroupCoordinator], what: str, size: str = "world_size", rank: str = "rank_in_group"
) -> tuple[Callable[[], int], Callable[[], int]]:
    """Two functions, which return the number of ranks in a group and this rank's position in it."""

    def get_world_size() -> int:
        return getattr(group(), size)

    def get_rank() -> int:
        return getattr(group(), rank)

    get_world_size.__doc__, get_rank.__doc__ = f"Number of ranks of {what}.", f"This rank's position in {what}."
    return get_world_size, get_rank


get_data_parallel_world_size, get_data_parallel_rank = _size_and_rank(get_dp_group, "data parallelism")
get_classifier_free_guidance_world_size, get_classifier_free_guidance_rank = _size_and_rank(get_cfg_group, "guidance")
get_sequence_parallel_world_size, get_sequence_parallel_rank = _size_and_rank(get_sp_group, "sequence parallelism")
get_ulysses_parallel_world_size, get_ulysses_parallel_rank = _size_and_rank(
    get_sp_group, "Ulysses", "ulysses_world_size", "ulysses_rank"
)
get_ring_parallel_world_size, get_ring_parallel_rank = _size_and_rank(
    get_sp_group, "the ring", "ring_world_size", "ring_rank"
)
get_pipeline_parallel_world_size, get_pipeline_parallel_rank = _size_and_rank(get_pp_group, "PipeFusion")
get_tensor_model_parallel_world_size, get_tensor_model_parallel_rank = _size_and_rank(
    get_tp_group, "tensor parallelism"
)
# The shorter names match those of the other methods; the longer ones are widely used.
get_tensor_parallel_world_size = get_tensor_model_parallel_world_size
get_tensor_parallel_rank = get_tensor_model_parallel_rank


def is_pipeline_first_stage() -> bool:
    """Whether this rank holds the first stage of its pipeline."""
    return get_pp_group().is_first_rank


def is_pipeline_last_stage() -> bool:
    """Whether this rank holds the last stage of its pipeline."""
    return get_pp_group().is_last_rank


def is_dp_last_group() -> bool:
    """Whether this rank is the last of its data-parallel replica, which holds the replica's images.

    This is the last rank in each of its sequence, CFG and pipeline groups.
    """
    return all(group().is_last_rank for group in (get_sp_group, get_cfg_group, get_pp_group))
