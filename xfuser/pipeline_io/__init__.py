"""The inputs and outputs of a pipeline's call."""
