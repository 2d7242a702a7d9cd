"""Weights: checkpoint files, modules without weights, shards, offload, and their placement for a pipeline."""
