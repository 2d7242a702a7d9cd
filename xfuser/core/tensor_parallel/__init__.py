"""Tensor parallelism: each rank keeps a part of the weights of each layer (Megatron-LM, arXiv 1909.08053).

Two steps, so that weights can be divided before they are there. ``structure.describe(model, ranks)`` makes a
``division.Division`` from names and sizes alone: which ranges of which parameter each rank keeps, how the forward of
each divided module is completed, and which numbers in modules change (heads). ``Division.apply`` cuts the parameters,
on the meta device as well, and returns what gathers them again.
"""
