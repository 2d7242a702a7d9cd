"""Model families as data: one plan each."""
