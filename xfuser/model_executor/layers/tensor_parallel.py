"""Import path of TensorParallelApplicator, as research code uses it."""

from xfuser.compat.tensor_parallel_applicator import TensorParallelApplicator

__all__ = ["TensorParallelApplicator"]
