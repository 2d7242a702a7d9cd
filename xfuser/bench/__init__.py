"""Measures: what the methods cost and gain on this machine (``xdit bench``, ``xdit quality``)."""
