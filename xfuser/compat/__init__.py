"""Names that code for the older engine imports, in addition to the public names of this package."""
