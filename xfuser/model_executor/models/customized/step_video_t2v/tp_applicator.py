"""Import path of TensorParallelApplicator in video models' scripts; it is not specific to one model."""

from xfuser.compat.tensor_parallel_applicator import TensorParallelApplicator

__all__ = ["TensorParallelApplicator"]
