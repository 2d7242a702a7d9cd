"""The patches of an image or video: bands of rows of tokens, or of frames."""

import math
from typing import Any

import torch
from torch import Tensor

from xfuser.core.distributed.utils import share, split_sizes
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.methods.tokens import Window
from xfuser.models.plan import ModelPlan


class Patches:
    """The division of latents into ``count`` consecutive parts whose rows of tokens differ by one at most.

    Image latents, ``[B, C, H, W]``, are divided by rows, packed ones, ``[B, tokens, C]``, by tokens, and those of
    videos, which have five dimensions, by frames, or by rows if there is one frame. All of these are called rows here.

    Args:
        config: of the transformer; tells how many rows of latents make a row of tokens.
        plan: of the transformer; tells which dimension of packed latents counts tokens, and of videos frames.

    Attributes:
        behind: rows of a transformer's packed latents behind those that the scheduler steps: tokens of pictures.
    """

    def __init__(self, count: int, config: Any, plan: ModelPlan) -> None:
        self.count, self.behind, self._dims = count, 0, {3: plan.packed, 4: 2, 5: plan.frames}
        self._prepared: Tensor | None = None  # packed latents that the scheduler is going to step
        size = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", [1])[0]
        of_time = size[0] if isinstance(size, list | tuple) and len(size) == 3 else 1
        of_rows = size[-2] if isinstance(size, list | tuple) else size
        self._units = {4: of_rows, 5: getattr(config, "patch_size_t", None) or of_time}
        self._of_video = {False: (plan.frames, self._units[5]), True: (plan.height, of_rows)}
        self._one_frame, self._divides_frames = False, plan.rows is None

    def prepare(self, latents: Any) -> None:
        """Note latents that a pipeline is going to step, where they are packed: what a transformer has behind them are
        pictures.

        Raises:
            ValueError: there are more patches than rows of tokens.
        """
        if isinstance(latents, Tensor) and latents.dim() == 3:
            self.rows(latents, 0)
            self._prepared = latents

    def begin(self, latents: Tensor) -> None:
        """Divide latents of this shape from now on."""
        frames, of_time = self._of_video[False]
        self._one_frame = latents.dim() == 5 and latents.shape[frames] == of_time and self._divides_frames
        self._dims[5], self._units[5] = self._of_video[self._one_frame]
        if self._prepared is not None:
            self.find_pictures(latents, self._prepared)

    def dim(self, latents: Tensor) -> int:
        """The dimension that is divided."""
        return self._dims.get(latents.dim(), 1)

    def kind(self, latents: Tensor) -> tuple[int, int]:
        """Number of dimensions, and of entries in the divided one; a video of one frame is as good as an image."""
        one_frame = self._one_frame and latents.dim() == 5
        return latents.dim() - one_frame, latents.shape[self.dim(latents)]

    def row_count(self, latents: Tensor) -> int:
        """Rows of tokens."""
        return latents.shape[self.dim(latents)] // self._unit(latents)

    def rows(self, latents: Tensor, patch: int) -> range:
        """Rows of tokens in a patch."""
        count = self.row_count(latents)
        if self.count > count:
            what = "frames" if latents.dim() == 5 and not self._one_frame else "rows"
            raise ValueError(
                f"num_pipeline_patch={self.count} is more than the {count} {what} of tokens of latents of shape"
                f" {tuple(latents.shape)}: use at most {count}"
            )
        return share(split_sizes(count, self.count), patch)

    def tokens(self, latents: Tensor, tokens: int, patch: int) -> range:
        """Tokens of a patch, of an image with that many tokens."""
        rows, width = self.rows(latents, patch), tokens // self.row_count(latents)
        return range(rows.start * width, rows.stop * width)

    def window(self, latents: Tensor, tokens: int, patch: int) -> Window:
        """What a patch computes of a transformer's latents with that many tokens: pictures and text with patch 0."""
        image = self.tokens(self.stepped(latents), tokens - self.behind, patch)
        return Window(image, patch == 0, range(tokens - self.behind, tokens) if patch == 0 else range(0))

    def find_pictures(self, given: Tensor, sample: Tensor, ranks: int = 1) -> None:
        """Set ``behind`` by a transformer's first latents and the sample of the first step, where they are packed.

        Args:
            ranks: those that have shared the tokens of the first step already.

        Raises:
            ValueError: patches have fewer tokens than there are ranks to share them, which the first step did not know.
        """
        if self.behind:
            return
        more = given.shape[self.dim(given)] - sample.shape[self.dim(given)] if given.dim() == sample.dim() == 3 else 0
        if more <= 0 or not torch.equal(given[tuple(map(slice, sample.shape))], sample.to(given.dtype)):
            return
        shared = len(self.rows(given, self.count - 1)) >= ranks
        self.behind, smallest = more, len(self.rows(sample, self.count - 1))
        if shared and smallest < ranks:
            what = f"patches of {smallest} tokens, beside those of pictures, on {ranks} ranks of Ulysses and ring"
            refuse(what, "the first step shared the tokens of larger ones", "Lower num_pipeline_patch")

    def stepped(self, x: Tensor) -> Tensor:
        """Of a transformer's latents or output, the rows that the scheduler steps, as a view."""
        return x.narrow(self.dim(x), 0, x.shape[self.dim(x)] - self.behind) if self.behind else x

    def view(self, latents: Tensor, rows: range) -> Tensor:
        """The latents of these rows of tokens, as a view."""
        unit = self._unit(latents)
        return latents.narrow(self.dim(latents), rows.start * unit, len(rows) * unit)

    def of(self, latents: Tensor, patch: int) -> Tensor:
        """The latents of a patch, as a view."""
        return self.view(latents, self.rows(latents, patch))

    def image_tokens(self, latents: Tensor) -> int:
        """Tokens of the image, where tokens have as many columns as rows, and videos' channels precede those."""
        units = (self._units[4],) * min(latents.dim() - 3, 2)  # of columns, and of a video's rows
        return self.row_count(latents) * math.prod(latents.shape[-1 - i] // unit for i, unit in enumerate(units))

    def _unit(self, latents: Tensor) -> int:
        return self._units.get(latents.dim(), 1)


def zeros(like: Tensor, dim: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in a tensor's shape, with another size along ``dim``."""
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape, dtype=dtype)
