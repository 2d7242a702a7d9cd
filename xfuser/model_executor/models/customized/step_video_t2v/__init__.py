"""Import path of tensor parallelism in Step-Video's scripts."""
