"""The scenes that the shipped pipelines generate, and a checker of images."""
