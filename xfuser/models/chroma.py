"""Chroma: as Flux, with a mask over pairs of tokens, which is cut in the attention; single-stream blocks carry both
streams in one argument."""

from dataclasses import replace

from xfuser.models.flux import FLUX

CHROMA = replace(FLUX, carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}})
