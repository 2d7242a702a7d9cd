"""Tiny transformers of every known class, and the matrix of what runs on them."""
