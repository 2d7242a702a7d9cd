"""The path by which video models import it; nothing in it is for one model."""

from xfuser.model_executor.layers.tensor_parallel import TensorParallelApplicator

__all__ = ["TensorParallelApplicator"]
