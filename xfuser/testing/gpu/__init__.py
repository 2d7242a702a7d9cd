"""Checks that require GPUs, as one command: ``python -m xfuser.testing.gpu`` (docs/gpu.md)."""
