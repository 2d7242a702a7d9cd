"""Tiny transformers of every known class, and the matrix of methods that they support."""
