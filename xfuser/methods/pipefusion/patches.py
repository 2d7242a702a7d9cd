"""The patches of an image or video: consecutive rows of tokens, or frames."""

import math
from typing import Any

import torch
from torch import Tensor

from xfuser.core.distributed.utils import share, split_sizes
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.methods.tokens import Window
from xfuser.models.plan import ModelPlan


class Patches:
    """Divides latents into ``count`` consecutive parts, whose numbers of token rows differ by at most one.

    Image latents, ``[B, C, H, W]``, are divided by rows; packed latents, ``[B, tokens, C]``, by tokens; video latents,
    which have five dimensions, by frames, or by rows if there is only one frame and blocks convolve no rows of tokens
    (``plan.rows``). All of these are called rows here.

    Args:
        config: the transformer's config; gives the number of rows of latents in a row of tokens.
        plan: the transformer's plan; gives the dimension of packed latents that counts tokens, and of videos frames.

    Attributes:
        ahead, behind: rows of tokens before and after those that the scheduler steps: given frames, reference images.
    """

    def __init__(self, count: int, config: Any, plan: ModelPlan) -> None:
        self.count, self._dims = count, {3: plan.packed, 4: 2, 5: plan.frames}
        self._prepared: Tensor | None = None  # packed latents that the scheduler will step
        size = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", [1])[0]
        of_time = size[0] if isinstance(size, list | tuple) and len(size) == 3 else 1
        of_rows = size[-2] if isinstance(size, list | tuple) else size
        self._units = {4: of_rows, 5: getattr(config, "patch_size_t", None) or of_time}
        self._of_video = {False: (plan.frames, self._units[5]), True: (plan.height, of_rows)}
        self._one_frame, self._divides_frames, self._padded = False, plan.rows is None, plan.padded
        self.ahead = self.behind = self._frame = 0

    def prepare(self, latents: Any) -> None:
        """Store packed latents that a pipeline will step; tokens that the transformer gets after them are references.

        Raises:
            ValueError: there are more patches than rows of tokens.
        """
        if isinstance(latents, Tensor) and latents.dim() == 3:
            self.rows(latents, 0)
            self._prepared = latents

    def begin(self, latents: Tensor) -> None:
        """Divide latents of this shape from now on."""
        self.ahead = self.behind = self._frame = 0
        frames, of_time = self._of_video[False]
        self._one_frame = latents.dim() == 5 and latents.shape[frames] == of_time and self._divides_frames
        self._dims[5], self._units[5] = self._of_video[self._one_frame]
        if self._prepared is not None:
            self.find_pictures(latents, self._prepared)

    def dim(self, latents: Tensor) -> int:
        """The dimension that is divided."""
        return self._dims.get(latents.dim(), 1)

    def kind(self, latents: Tensor) -> tuple[int, int]:
        """Number of dimensions, and of entries in the divided one.

        A video of one frame counts as an image, and packed latents as the video that the scheduler steps.
        """
        if latents.dim() == 3 and self._frame:
            return 5, latents.shape[self.dim(latents)] // self._frame
        one_frame = self._one_frame and latents.dim() == 5
        return latents.dim() - one_frame, latents.shape[self.dim(latents)]

    def row_count(self, latents: Tensor) -> int:
        """The number of rows of tokens."""
        return latents.shape[self.dim(latents)] // self._unit(latents)

    def rows(self, latents: Tensor, patch: int) -> range:
        """The rows of tokens in a patch; the tokens of its frames if the scheduler steps packed latents as a video."""
        frame = self._frame if latents.dim() == 3 and self._frame else 1
        count = self.row_count(latents) // frame
        if self.count > count:
            what = "frames" if latents.dim() == 5 and not self._one_frame else "rows"
            advice = f"use at most {count}" if count else "use Ulysses, ring, CFG or data parallelism"
            raise ValueError(
                f"num_pipeline_patch={self.count} is more than the {count} {what} of tokens of latents of shape"
                f" {tuple(latents.shape)}: {advice}"
            )
        rows = share(split_sizes(count, self.count), patch)
        return range(rows.start * frame, rows.stop * frame)

    def window(self, latents: Tensor, tokens: int, patch: int) -> Window:
        """The tokens of a transformer that a patch computes; patch 0 includes all tokens outside of the image."""
        end = self.image_tokens(latents) if self._padded else tokens
        rows, width = self.rows(self.stepped(latents), patch), end // self.row_count(latents)
        image = range((rows.start + self.ahead if patch else 0) * width, (rows.stop + self.ahead) * width)
        return Window(image, patch == 0, range(0) if patch else range(end - self.behind * width, tokens))

    def find_pictures(self, given: Tensor, sample: Tensor, ranks: int = 1) -> None:
        """Set ``ahead`` and ``behind`` from a transformer's first latents and the sample of the first step.

        Either both are packed, and the latents end with reference images; or the sample is a video that lacks the
        first frames of the latents. If only the latents are packed, their tokens are the pixels of the video.

        Args:
            ranks: number of ranks that shared the tokens of the first step.

        Raises:
            ValueError: patches have fewer tokens than there are ranks to share them, unknown in the first step.
        """
        packs = given.dim() == 3 and sample.dim() == 5
        rows = sample.movedim(3 - self._dims[5], -1).flatten(1, 3) if packs else sample
        dim, unit = self.dim(given), self._unit(given)
        more = given.shape[dim] - rows.shape[dim] if given.dim() == rows.dim() in (3, 5) else -1
        if more < (not packs) or self._one_frame or self.ahead + self.behind:
            return
        ahead, own = more if sample.dim() == 5 else 0, tuple(map(slice, rows.shape))
        if not torch.equal(given.narrow(dim, ahead, rows.shape[dim])[own], rows.to(given.dtype)):
            return
        before = len(self.rows(given, self.count - 1))
        self.ahead, self.behind = ahead // unit, (more - ahead) // unit
        self._frame = rows.shape[dim] // self.row_count(sample) if packs else 0
        height, of_rows = self._of_video[True]
        width = 1 if given.dim() == 3 else math.prod(given.shape[height : height + 2]) // of_rows**2
        smallest = len(self.rows(self.stepped(given), self.count - 1)) * width
        if smallest < ranks <= before * width:
            what = f"patches of {smallest} tokens, beside those of pictures, on {ranks} ranks of Ulysses and ring"
            refuse(what, "the first step shared the tokens of larger ones", "Lower num_pipeline_patch")

    def stepped(self, x: Tensor) -> Tensor:
        """The rows of a transformer's latents or output that the scheduler steps, as a view."""
        if not self.ahead + self.behind:
            return x
        return self.view(x, range(self.ahead, self.row_count(x) - self.behind))

    def view(self, latents: Tensor, rows: range) -> Tensor:
        """The latents of these rows of tokens, as a view."""
        unit = self._unit(latents)
        return latents.narrow(self.dim(latents), rows.start * unit, len(rows) * unit)

    def of(self, latents: Tensor, patch: int) -> Tensor:
        """The latents of a patch, as a view."""
        return self.view(latents, self.rows(latents, patch))

    def image_tokens(self, latents: Tensor) -> int:
        """The number of image tokens; tokens are square, and video latents end with their rows and columns."""
        units = (self._units[4],) * min(latents.dim() - 3, 2)  # of columns, and of a video's rows
        return self.row_count(latents) * math.prod(latents.shape[-1 - i] // unit for i, unit in enumerate(units))

    def _unit(self, latents: Tensor) -> int:
        return self._units.get(latents.dim(), 1)


def zeros(like: Tensor, dim: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in the shape of a tensor, except for the size along ``dim``."""
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape, dtype=dtype)
