"""Where weights are: checkpoint files, modules without weights, shards, offload, and all of them for one pipeline."""
