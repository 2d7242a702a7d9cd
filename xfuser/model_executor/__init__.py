"""Parts for models that run their own parallel forward, under the paths by which they are imported."""
