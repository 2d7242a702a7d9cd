"""What goes into a pipeline's call, and what comes out of it."""
