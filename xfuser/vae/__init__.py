"""Parallel VAE: decode and encode with the rows of the image divided over ranks, equal to one device."""

from xfuser.vae.parallelize import parallelize_vae

__all__ = ["parallelize_vae"]
