"""What only a machine with GPUs can settle, as one command: ``python -m xfuser.testing.gpu`` (docs/gpu.md)."""
