"""``xdit`` and its commands."""
