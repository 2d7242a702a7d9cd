"""Tensor parallelism: each rank keeps a part of the weights of each layer (Megatron-LM, arXiv 1909.08053).

There are two steps, so that weights can be divided before they are loaded. ``structure.describe(model, ranks)`` makes a
``division.Division`` from names and sizes only: which ranges of which parameter each rank keeps, how the forward of
each divided module is completed, and which numbers in modules change (heads). ``Division.apply`` cuts the parameters,
also on the meta device, and returns a function that gathers them again.
"""
