"""Plans of model families, as data."""
