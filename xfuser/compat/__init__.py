"""What code written for the older engine imports, beside the public names of this package."""
