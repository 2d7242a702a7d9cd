"""Measures the cost and gain of the methods on this machine (``xdit bench``, ``xdit quality``)."""
