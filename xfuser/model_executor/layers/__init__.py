"""Layers as functions, and layers of which each rank holds a part."""
