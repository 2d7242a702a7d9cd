"""PipeFusion's semantics in one process, by another mechanism than the engine's.

The pipeline's loop and scheduler are untouched. Each call of the transformer becomes M forwards of the *whole* image,
of which forward m gives the rows of patch m. What makes them differ are key and value projections: in forward m, those
of other patches' tokens, and of text for m > 0, are replaced by what was kept of the forward that owned them.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.models.registry import plan_of

PROJECTIONS = ("to_k", "to_v", "add_k_proj", "add_v_proj", "to_key", "to_value", "to_qkv_mlp_proj")


def bands(count: int, parts: int) -> list[slice]:
    """Consecutive ranges that differ in length by one at most, longer ones first."""
    base, extra = divmod(count, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


class Displaced:
    """The state of one loop: where it is, and the projections kept from earlier forwards."""

    def __init__(self, model: nn.Module, plan: ModelPlan, patches: int, warmup: int, order: int) -> None:
        self.model, self.plan, self.patches, self.synchronous = model, plan, patches, max(1, warmup * order)
        self.step = self.call = 0
        self.patch: int | None = None
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs[self.plan.latents]
        dim, unit, self.width = self.layout(latents)
        self.tokens = latents.shape[dim] // unit * self.width
        rows = bands(latents.shape[dim] // unit, self.patches)
        self.own = [slice(band.start * self.width, band.stop * self.width) for band in rows]
        if self.step < self.synchronous:
            self.patch = None
            output = original(*args, **kwargs)
        else:
            outputs = []
            for patch in range(self.patches):
                self.patch = patch
                outputs.append(original(*args, **kwargs))
            tensors = [x if isinstance(x, torch.Tensor) else x[0] for x in outputs]
            parts = [
                x.narrow(dim, b.start * unit, (b.stop - b.start) * unit) for x, b in zip(tensors, rows, strict=True)
            ]
            whole = torch.cat(parts, dim=dim)
            kind = type(outputs[0])
            output = whole if kind is torch.Tensor else (whole,) if kind is tuple else kind(sample=whole)
        self.call += 1
        return output

    def layout(self, latents: torch.Tensor) -> tuple[int, int, int]:
        """The dimension that is divided, its entries per row of tokens, and the tokens in such a row."""
        size = getattr(self.model.config, "patch_size", 1)
        of_time, of_rows, of_columns = (
            [*([1] * (3 - len(size))), *size] if isinstance(size, list | tuple) else (1, size, size)
        )
        of_time = getattr(self.model.config, "patch_size_t", None) or of_time
        if latents.dim() == 3:
            return 1, 1, 1
        if latents.dim() == 4:
            return 2, of_rows, latents.shape[3] // of_columns
        dim = self.plan.frames
        height, width = latents.shape[2:4] if self.model.config.get("in_visual_dim") else latents.shape[3:5]
        return dim, of_time, (height // of_rows) * (width // of_columns)

    def project(self, name: str, text_first: bool, columns: slice, output: torch.Tensor) -> torch.Tensor:
        """Hook on a projection ``[B, tokens, C]``: own rows are kept, the others replaced by kept ones."""
        key = (name, self.call)
        if self.patch is None:
            self.kept[key] = output.clone()
            return output
        kept = self.kept[key]
        count = output.shape[1]
        text = slice(0, 0)
        if name.rpartition(".")[2].startswith("add_"):  # of text alone
            text, image = slice(0, count), slice(0, 0)
        else:
            words = count - self.tokens
            start = words if text_first else 0
            own = self.own[self.patch]
            image = slice(start + own.start, start + own.stop)
            text = slice(0, words) if text_first else slice(self.tokens, count)
        kept[:, image] = output[:, image]
        if self.patch == 0:
            kept[:, text] = output[:, text]
        result = output.clone()
        result[..., columns] = kept[..., columns]
        return result


@contextmanager
def displaced(pipe: Any, patches: int, warmup: int) -> Iterator[None]:
    """Within the context, a bare pipeline draws with PipeFusion's semantics."""
    model, plan = pipe.transformer, plan_of(pipe.transformer)
    state = Displaced(model, plan, patches, warmup, pipe.scheduler.order)
    original, step = model.forward, pipe.scheduler.step
    with ExitStack() as stack:
        for block in blocks_of(model, plan):
            for attention, streams in plan.attentions().items():
                for kind in PROJECTIONS:
                    name = f"{block.list_name}.{block.index}.{attention}.{kind}"
                    if name not in dict(model.named_modules()):
                        continue
                    owner = model.get_submodule(name.rpartition(".")[0])
                    width = owner.inner_dim if kind == "to_qkv_mlp_proj" else None
                    columns = slice(width, 3 * width) if width else slice(None)

                    def hook(
                        m: nn.Module, a: tuple, out: torch.Tensor, name=name, s=streams, c=columns
                    ) -> torch.Tensor:
                        return state.project(name, s.keys[0] == "text", c, out)

                    stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        model.forward = lambda *args, **kwargs: state.forward(original, *args, **kwargs)
        stack.callback(lambda: model.__dict__.pop("forward"))

        def counted(*args: Any, **kwargs: Any) -> Any:
            state.step, state.call = state.step + 1, 0
            return step(*args, **kwargs)

        counted.__wrapped__ = step
        pipe.scheduler.step = counted
        stack.callback(lambda: pipe.scheduler.__dict__.pop("step"))
        yield
