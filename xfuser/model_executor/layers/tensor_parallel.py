"""The path by which research code imports it."""

from xfuser.compat.tensor_parallel_applicator import TensorParallelApplicator

__all__ = ["TensorParallelApplicator"]
