"""Import paths of parts for single models."""
