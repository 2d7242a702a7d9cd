"""Parallel VAE: decode and encode with the image's rows divided over ranks; results equal those of one device."""

from xfuser.vae.parallelize import parallelize_vae

__all__ = ["parallelize_vae"]
