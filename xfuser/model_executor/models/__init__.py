"""Paths under which scripts import parts for single models."""
