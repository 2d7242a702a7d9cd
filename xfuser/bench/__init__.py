"""Measures: what the methods cost and gain on this machine (``python -m xfuser.bench``)."""
