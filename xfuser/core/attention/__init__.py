"""Exact attention over a sequence that is spread over ranks."""
