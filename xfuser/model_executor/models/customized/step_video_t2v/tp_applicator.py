"""The path by which video models import it; nothing in it is for one model."""

from xfuser.compat.tensor_parallel_applicator import TensorParallelApplicator

__all__ = ["TensorParallelApplicator"]
