"""The patches of an image: bands of whole token rows."""

import torch

from xfuser.core.distributed.utils import share, split_sizes


class Patches:
    """The division of images into ``count`` bands of rows that differ by one row of tokens at most.

    Latents are ``[B, C, H, W]``, with ``patch_size`` rows of them in a row of tokens, or packed ``[B, tokens, C]``,
    where bands are of tokens.
    """

    def __init__(self, count: int, patch_size: int) -> None:
        self.count, self._patch_size = count, patch_size

    @staticmethod
    def dim(latents: torch.Tensor) -> int:
        """The dimension that is divided."""
        return 2 if latents.dim() == 4 else 1

    def row_count(self, latents: torch.Tensor) -> int:
        """Rows of tokens."""
        return latents.shape[self.dim(latents)] // self._unit(latents)

    def token_rows(self, latents: torch.Tensor, patch: int) -> range:
        """Rows of tokens in a patch."""
        count = self.row_count(latents)
        if self.count > count:
            raise ValueError(
                f"num_pipeline_patch={self.count} is more than the {count} rows of tokens of a picture with latents of"
                f" shape {tuple(latents.shape)}: use at most {count}"
            )
        return share(split_sizes(count, self.count), patch)

    def latent_rows(self, latents: torch.Tensor, rows: range) -> range:
        """Rows of latents, along :meth:`dim`, behind these rows of tokens."""
        unit = self._unit(latents)
        return range(rows.start * unit, rows.stop * unit)

    def rows(self, latents: torch.Tensor, patch: int) -> range:
        """Rows of latents in a patch, along :meth:`dim`."""
        return self.latent_rows(latents, self.token_rows(latents, patch))

    def tokens(self, latents: torch.Tensor, tokens: int, patch: int) -> range:
        """Tokens of a patch, of an image with that many tokens."""
        width = tokens // self.row_count(latents)
        rows = self.token_rows(latents, patch)
        return range(rows.start * width, rows.stop * width)

    def _unit(self, latents: torch.Tensor) -> int:
        return self._patch_size if latents.dim() == 4 else 1


def rows_of(x: torch.Tensor, rows: range) -> torch.Tensor:
    """These rows of latents, as a view."""
    return x.narrow(Patches.dim(x), rows.start, len(rows))
