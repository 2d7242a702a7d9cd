"""The little world that the shipped pipelines draw: its scenes, and a checker of images."""
