"""What a configuration of degrees takes, counted without weights and without other ranks."""
