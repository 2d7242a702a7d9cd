"""The attention layer that research code imports."""
