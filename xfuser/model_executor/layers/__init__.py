"""Import paths of sharded attention as functions, and of tensor parallelism."""
