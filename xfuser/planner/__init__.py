"""Predicts the memory and time of a combination of degrees, without weights and without other ranks."""
