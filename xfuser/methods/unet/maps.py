"""A U-Net's maps, split over ranks: each rank holds a band of rows, or of columns, at every level."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from xfuser.call import Forward
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.hooks import Arguments, edited_arguments, edited_output
from xfuser.methods.distrifusion import DistriFusion
from xfuser.methods.naive_patch import NaivePatches
from xfuser.methods.sharded import ShardedModel
from xfuser.methods.unet.map_bands import OnMaps
from xfuser.models.plan import ModelPlan

Parts = DistriFusion | NaivePatches | None  # what a rank sees of other parts; None on a single rank
TEXT = "encoder_hidden_states"


class MapParallel(ShardedModel):
    """One U-Net over one group, one part per rank: the counterpart of :class:`SequenceParallel` for U-Nets."""

    def __init__(
        self, model: nn.Module, plan: ModelPlan, group: SequenceParallelGroupCoordinator, backend: str, parts: Parts
    ) -> None:
        super().__init__(model, plan, group, backend)
        self._parts = parts
        self._running = ExitStack()  # contexts that are open from the first map to the last
        self._mode: OnMaps | None = None
        self._text: dict[str, int] = {}  # number of text tokens in each attention module's last call

    def _hooks(self) -> Iterator[AbstractContextManager[None]]:
        if self._parts:
            yield edited_output(self._model.get_submodule(self._plan.embed), self._begin)
            yield edited_output(self._model.get_submodule(self._plan.head), self._end)
        for name in self._attention_places():
            yield edited_arguments(self._model.get_submodule(name), partial(self._enter_attention, name))

    def _wrapper(self, forward: Forward, arguments: Arguments) -> object:
        if not self._parts:
            return forward(arguments)
        self._dim = -1 if self._parts.across else -2
        self._set_levels(arguments[self._plan.latents].shape[self._dim])
        for name in (*self._plan.residuals, *([self._plan.latents] if self._parts.alone else [])):
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(Tensor, self._cut, arguments[name])
        try:
            return forward(arguments)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._running.close()
        self._mode = None

    def _set_levels(self, rows: int) -> None:
        """Set the rows of each rank's part by the rows of the full map; parts begin at the same place at all levels."""
        halvings, ranks = getattr(self._model, self._plan.halvings), self._group.world_size
        unit = 2**halvings
        units = -(-rows // unit)
        if units < ranks:
            raise ValueError(
                f"{ranks} ranks cannot divide latents of {rows} {'columns' if self._dim == -1 else 'rows'}, which"
                f" shrink to {units} in the middle of this {type(self._model).__name__}: use a degree of at most"
                f" {units}, or a larger image"
            )
        sizes = [size * unit for size in split_sizes(units, ranks)]
        sizes[-1] -= units * unit - rows
        levels = [[-(-size // 2**level) for size in sizes] for level in range(halvings + 1)]
        self._sizes = sizes
        self._levels = {sum(level): level for level in levels}

    def _cut(self, x: Tensor) -> Tensor:
        rows = x.shape[self._dim]
        if rows not in self._levels:
            known = ", ".join(map(str, self._levels))
            raise ValueError(f"a map of {rows} rows: maps of this {type(self._model).__name__} have {known} rows")
        own = share(self._levels[rows], self._group.rank_in_group)
        return x.narrow(self._dim, own.start, len(own))

    def _begin(self, maps: Tensor) -> Tensor:
        """After the module that embeds the latents: cut its output to this rank's part, unless these were cut."""
        if self._parts.alone:
            return maps
        self._mode = self._running.enter_context(self._parts.on_maps(self._sizes, maps.shape[-1]))
        return self._cut(maps)

    def _end(self, maps: Tensor) -> Tensor:
        """After the last module: gather the full map."""
        self._leave()
        return self._group.all_gather(maps, dim=maps.dim() + self._dim, sizes=self._sizes)

    def _enter_attention(self, name: str, arguments: Arguments) -> None:
        text = arguments.get(TEXT)
        text = text[0] if isinstance(text, tuple) else text  # an IP-adapter's images follow the text
        self._text[name] = 0 if text is None else text.shape[1]

    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        text, mode = self._text[name], self._mode
        with ExitStack() as stack:
            if mode:
                stack.enter_context(mode.attending())
            if mode and (not text or k.shape[2] == text + q.shape[2]):  # skipped for attention to text only
                if text or mask is not None:
                    what = f"{name} attends to pixels with a mask or with text"
                    raise mode.bands.refusal(f"{what}, which is not supported")
                k, v = stack.enter_context(mode.bands.reach(k, v))
            return self._local(q, k, v, mask, scale)
