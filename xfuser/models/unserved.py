"""Transformer classes of Diffusers that have no plan, and why no plan can describe them."""

UNSERVED: dict[str, str] = {}
