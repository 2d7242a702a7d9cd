"""Import paths of parts for models that run their own parallel forward."""
