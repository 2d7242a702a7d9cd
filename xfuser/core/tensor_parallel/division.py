"""What each rank keeps of a model's parameters: a description, and its application."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.tensor_parallel.layers import Divided, completed


class Section(NamedTuple):
    """Consecutive entries of a dimension that are divided over the ranks: the part of each rank, and their number."""

    parts: tuple[range, ...]
    total: int

    def times(self, size: int) -> "Section":
        """The same of entries that are ``size`` long each, as the channels of heads are."""
        return Section(tuple(range(part.start * size, part.stop * size) for part in self.parts), self.total * size)


def evenly(total: int, ranks: int) -> Section:
    """Shares that differ by one at most."""
    sizes = split_sizes(total, ranks)
    return Section(tuple(share(sizes, rank) for rank in range(ranks)), total)


@dataclass(frozen=True)
class Cut:
    """How a tensor is divided along ``dim``.

    Attributes:
        kept: for each rank, the ranges of the whole that it keeps, in order. Ranks may keep the same entries.
        total: entries of the whole.
    """

    dim: int
    kept: tuple[tuple[range, ...], ...]
    total: int

    @property
    def sizes(self) -> list[int]:
        """Entries that each rank keeps."""
        return [sum(map(len, ranges)) for ranges in self.kept]

    def part(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """What ``rank`` keeps of the whole."""
        pieces = [whole.narrow(self.dim, one.start, len(one)) for one in self.kept[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)

    def whole(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The whole, of what all ranks keep."""
        shape = list(parts[0].shape)
        shape[self.dim] = self.total
        whole = parts[0].new_empty(shape)
        for ranges, part in zip(self.kept, parts, strict=True):
            pieces = part.split([len(one) for one in ranges], self.dim)
            for one, piece in zip(ranges, pieces, strict=True):
                whole.narrow(self.dim, one.start, len(one)).copy_(piece)
        return whole


def cut(dim: int, *sections: Section) -> Cut:
    """Divide a dimension that consists of ``sections``, each of which is divided by itself."""
    starts = [0, *accumulate(section.total for section in sections)]
    kept = zip(
        *([range(start + one.start, start + one.stop) for one in section.parts]
          for start, section in zip(starts, sections, strict=False)),
        strict=True,
    )  # fmt: skip
    return Cut(dim, tuple(kept), starts[-1])


@dataclass
class Division:
    """How a model is divided over ``ranks``.

    Attributes:
        cuts: parameters by name; those that are not named stay whole on every rank.
        completions: divided modules by name, to how their forward is completed (``layers.py``) and the cut that this is
            about; modules whose divided forward needs nothing are not named.
        numbers: names of modules, to the attributes that count what is divided, to their value on each rank.
        heads: names of attention modules that are divided by heads, to the heads of each rank.
    """

    ranks: int
    cuts: dict[str, Cut] = field(default_factory=dict)
    completions: dict[str, tuple[type[Divided], Cut]] = field(default_factory=dict)
    numbers: dict[str, dict[str, tuple[Any, ...]]] = field(default_factory=dict)
    heads: dict[str, Section] = field(default_factory=dict)

    def kept(self, rank: int) -> dict[str, tuple[int, tuple[range, ...]]]:
        """Name of each divided parameter, to the dimension that is divided and the ranges of it that ``rank`` keeps.

        This is all that a loader needs: what is not named, it reads whole; of the others it reads these ranges, and
        puts them one behind the other along the dimension. The names are those of the whole model.
        """
        return {name: (cut.dim, cut.kept[rank]) for name, cut in self.cuts.items()}

    def apply(self, model: nn.Module, group: GroupCoordinator) -> None:
        """Cut the model's parameters in place to what this rank keeps, and let its modules work on that.

        Parameters on the meta device become smaller ones there, to be filled with what :meth:`kept` says.
        """
        rank = group.rank_in_group
        modules = dict(model.named_modules(remove_duplicate=False))
        self._renew(modules, lambda x, cut: cut.part(x, rank).clone())
        for name, (kind, cut) in self.completions.items():
            completed(modules[name], kind, cut, group)
        for name, values in self.numbers.items():
            for key, of_ranks in values.items():
                setattr(modules[name], key, of_ranks[rank])

    def restore(
        self, modules: dict[str, nn.Module], group: GroupCoordinator, numbers: dict[str, dict[str, Any]]
    ) -> None:
        """Undo :meth:`apply`: all ranks gather the parameters.

        Args:
            modules: those that were divided, by the names that they had then.
            numbers: the attributes of before.
        """

        def gathered(x: torch.Tensor, cut: Cut) -> torch.Tensor:
            parts = group.all_gather(x.to(group.device), cut.dim, separate_tensors=True, sizes=cut.sizes)
            return cut.whole(parts).to(x.device)

        self._renew(modules, gathered)
        for name in self.completions:
            modules[name].undivided()
        for name, values in numbers.items():
            for key, value in values.items():
                setattr(modules[name], key, value)

    def numbers_of(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """The attributes that :meth:`apply` changes, as they are now."""
        return {
            name: {key: getattr(model.get_submodule(name), key) for key in values}
            for name, values in self.numbers.items()
        }

    @torch.no_grad()
    def _renew(self, modules: dict[str, nn.Module], change: Callable[[torch.Tensor, Cut], torch.Tensor]) -> None:
        """Replace the parameters that are cut; one that several modules share stays shared."""
        renewed: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, cut in self.cuts.items():
            owner, _, key = name.rpartition(".")
            module = modules[owner]
            old = module._parameters[key]
            if id(old) not in renewed:
                renewed[id(old)] = old, nn.Parameter(change(old.detach(), cut), requires_grad=old.requires_grad)
            module._parameters[key] = renewed[id(old)][1]
