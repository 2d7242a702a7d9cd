"""Step-Video's scripts import their tensor parallelism from here."""
