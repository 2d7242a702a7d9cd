"""Reference semantics of DistriFusion for a U-Net, in one process, with a mechanism other than the engine's.

Nothing is split. After the warm-up, one forward computes all bands, as additional batch entries with the whole map.
The input of a module is right only in the band's own rows; before each module that mixes rows, the other rows are
replaced by the input that this module had in the previous step.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from xfuser.core.hooks import replaced


class DisplacedUNet:
    """The state of one loop.

    Args:
        edges: the first row of each band of the latents, and the number of rows.
    """

    def __init__(self, unet: nn.Module, edges: list[int], mode: str, warmup: int) -> None:
        self.unet, self.edges, self.mode, self.warmup = unet, edges, mode, max(1, warmup)
        self.bands, self.step = len(edges) - 1, 0
        self.last: dict[str, torch.Tensor] = {}  # input of each module in the previous step
        self.fresh: dict[str, torch.Tensor] = {}

    def forward(self, original: Any, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        self.columns = sample.shape[3]
        self.late = self.mode != "full_sync" and self.step >= self.warmup
        self.step += 1
        if self.late:
            several = tree_map_only(torch.Tensor, lambda x: torch.cat([x] * self.bands), kwargs)
            output = original(torch.cat([sample] * self.bands), timestep, **several)[0]
            output = self.own_rows(output, 2, self.edges)
        else:
            output = original(sample, timestep, **kwargs)[0]
        if not (self.late and self.mode == "no_sync"):
            self.last = self.fresh
        self.fresh = {}
        return (output,)

    def level(self, rows: int) -> int:
        return next(level for level in range(9) if -(-self.edges[-1] // 2**level) == rows)

    def edges_at(self, level: int) -> list[int]:
        return [-(-edge // 2**level) for edge in self.edges]

    def own_rows(self, x: torch.Tensor, dim: int, edges: list[int]) -> torch.Tensor:
        """Return the whole map, with each band from its own batch entries."""
        parts = [
            one.narrow(dim, edges[band], edges[band + 1] - edges[band]) for band, one in enumerate(x.chunk(self.bands))
        ]
        return torch.cat(parts, dim)

    def seen(self, name: str, x: torch.Tensor, dim: int, edges: list[int]) -> torch.Tensor:
        """Return a module's input, with all rows except the band's own from the previous step."""
        if not self.late:
            self.fresh[name] = x
            return x
        self.fresh[name] = self.own_rows(x, dim, edges)
        seen = []
        for band, one in enumerate(x.chunk(self.bands)):
            whole = self.last[name].clone()
            own = slice(edges[band], edges[band + 1])
            whole.movedim(dim, 0)[own] = one.movedim(dim, 0)[own]
            seen.append(whole)
        return torch.cat(seen)

    def convolution(self, name: str, module: nn.Module, args: tuple) -> tuple:
        return (self.seen(name, args[0], 2, self.edges_at(self.level(args[0].shape[2]))),)

    def projection(self, name: str, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        columns = [-(-self.columns // 2**level) for level in range(9)]
        edges = next(
            [edge * columns[level] for edge in self.edges_at(level)]
            for level in range(9)
            if self.edges_at(level)[-1] * columns[level] == output.shape[1]
        )
        return self.seen(name, output, 1, edges)

    def norm(self, name: str, module: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """Group norm of the whole map from (mean, mean of squares) of the bands, ``[bands, 2, B, groups]``."""
        edges = self.edges_at(self.level(x.shape[2]))
        parts = x.chunk(self.bands) if self.late else [x] * self.bands
        own = torch.stack([
            _moments(one[:, :, edges[band] : edges[band + 1]], module.num_groups) for band, one in enumerate(parts)
        ])  # fmt: skip
        self.fresh[name] = own
        shares = torch.tensor([b - a for a, b in pairwise(edges)], dtype=torch.float64)
        shares = (shares / edges[-1]).view(-1, 1, 1, 1)
        whole = (own * shares).sum(0)
        if not self.late:
            return _normal(module, x, whole)
        last = self.last[name]
        results = []
        for band, one in enumerate(parts):
            if self.mode in ("separate_gn", "no_sync"):
                moments = own[band]
            elif self.mode == "sync_gn":
                moments = whole
            elif self.mode == "stale_gn":
                moments = (torch.cat([last[:band], own[band : band + 1], last[band + 1 :]]) * shares).sum(0)
            else:
                moments = (last * shares).sum(0) + own[band] - last[band]
                below = moments[1] < moments[0] ** 2
                variance = torch.where(below, own[band, 1] - own[band, 0] ** 2, moments[1] - moments[0] ** 2)
                moments = torch.stack([moments[0], variance + moments[0] ** 2])
            results.append(_normal(module, one, moments))
        return torch.cat(results)

    @contextmanager
    def active(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self.unet.named_modules():
                if isinstance(module, nn.Conv2d) and name != "conv_in":  # every rank has all latents
                    hook = lambda m, args, name=name: self.convolution(name, m, args)  # noqa: E731
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                if name.endswith(("attn1.to_k", "attn1.to_v")):
                    hook = lambda m, args, output, name=name: self.projection(name, m, args, output)  # noqa: E731
                    stack.callback(module.register_forward_hook(hook).remove)
                if isinstance(module, nn.GroupNorm):
                    norm = lambda x, name=name, module=module: self.norm(name, module, x)  # noqa: E731
                    stack.enter_context(replaced(module, "forward", norm))
            original = self.unet.forward
            forward = lambda *args, **kwargs: self.forward(original, *args, **kwargs)  # noqa: E731
            stack.enter_context(replaced(self.unet, "forward", forward))
            yield


def _moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    x = x.double().reshape(x.shape[0], groups, -1)
    return torch.stack([x.mean(-1), x.square().mean(-1)])


def _normal(module: nn.GroupNorm, x: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    mean, variance = (one[..., None] for one in (moments[0], moments[1] - moments[0] ** 2))
    normal = (x.double().reshape(*mean.shape[:2], -1) - mean) / (variance + module.eps).sqrt()
    normal = normal.reshape(x.shape).to(x.dtype)
    return normal * module.weight[:, None, None] + module.bias[:, None, None]
