"""Process groups: one rank grid defines every group; getters raise a RuntimeError before initialisation."""

from xfuser.core.distributed.group_coordinator import (
    GroupCoordinator as GroupCoordinator,
    SequenceParallelGroupCoordinator as SequenceParallelGroupCoordinator,
)
from xfuser.core.distributed.parallel_state import (
    destroy_distributed_environment as destroy_distributed_environment,
    destroy_model_parallel as destroy_model_parallel,
    get_branch_group as get_branch_group,
    get_cfg_group as get_cfg_group,
    get_classifier_free_guidance_rank as get_classifier_free_guidance_rank,
    get_classifier_free_guidance_world_size as get_classifier_free_guidance_world_size,
    get_data_parallel_rank as get_data_parallel_rank,
    get_data_parallel_world_size as get_data_parallel_world_size,
    get_dp_group as get_dp_group,
    get_forward_group as get_forward_group,
    get_pipeline_parallel_rank as get_pipeline_parallel_rank,
    get_pipeline_parallel_world_size as get_pipeline_parallel_world_size,
    get_pp_group as get_pp_group,
    get_replica_group as get_replica_group,
    get_ring_parallel_rank as get_ring_parallel_rank,
    get_ring_parallel_world_size as get_ring_parallel_world_size,
    get_sequence_parallel_rank as get_sequence_parallel_rank,
    get_sequence_parallel_world_size as get_sequence_parallel_world_size,
    get_sp_group as get_sp_group,
    get_tensor_model_parallel_rank as get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size as get_tensor_model_parallel_world_size,
    get_tensor_parallel_rank as get_tensor_parallel_rank,
    get_tensor_parallel_world_size as get_tensor_parallel_world_size,
    get_tp_group as get_tp_group,
    get_ulysses_parallel_rank as get_ulysses_parallel_rank,
    get_ulysses_parallel_world_size as get_ulysses_parallel_world_size,
    get_world_group as get_world_group,
    init_distributed_environment as init_distributed_environment,
    initialize_model_parallel as initialize_model_parallel,
    is_dp_last_group as is_dp_last_group,
    is_pipeline_first_stage as is_pipeline_first_stage,
    is_pipeline_last_stage as is_pipeline_last_stage,
    launched_world_size as launched_world_size,
    model_parallel_degrees as model_parallel_degrees,
    model_parallel_is_initialized as model_parallel_is_initialized,
)
from xfuser.core.distributed.runtime_state import (
    get_runtime_state as get_runtime_state,
    initialize_runtime_state as initialize_runtime_state,
    runtime_state_is_initialized as runtime_state_is_initialized,
)
from xfuser.core.distributed.utils import RankGenerator as RankGenerator
