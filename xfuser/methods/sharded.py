"""The base class for models whose tokens, or rows of maps, are sharded."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from xfuser.call import CallState, Forward
from xfuser.core.attention.dispatch import asked
from xfuser.core.attention.intercept import intercepted
from xfuser.core.attention.kernels import attention
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.hooks import Arguments
from xfuser.models.plan import ModelPlan


class ShardedModel(ABC):
    """One model whose forward is sharded over one group, during one call."""

    many, idle = True, ()  # arguments of :func:`intercepted`

    def __init__(
        self, model: nn.Module, plan: ModelPlan, group: SequenceParallelGroupCoordinator, backend: str = "auto"
    ) -> None:
        self._model, self._plan, self._group, self._configured = model, plan, group, backend

    @property
    def _backend(self) -> str:
        """The attention backend: the configured one or, with ``"auto"``, the one that the model asks for."""
        return asked.backend if self._configured == "auto" else self._configured

    def enter(self, call: CallState) -> None:
        """During the call, the model's modules and its attention work on shards."""
        self._call = call
        call.around(self._model, self._wrapper)
        self._hook()

    def _hook(self) -> None:
        """Hook the model's modules, and intercept its attention, until the call ends."""
        for context in self._hooks():
            self._call.enter_context(context)
        places = self._attention_places()
        attentions = {name: self._model.get_submodule(name) for name in places}
        attend = partial(partial, self._attend)  # from a module's name to its attention
        again = self._attends_again(attentions)
        self._call.enter_context(intercepted(attentions, attend, self.many, self.idle, places, again))

    @abstractmethod
    def _wrapper(self, forward: Forward, arguments: Arguments) -> Any:
        """Run around the model's forward: set up and clear the state of one forward."""

    @abstractmethod
    def _hooks(self) -> Iterable[AbstractContextManager[None]]:
        """The hooks into the model's modules, outermost first."""

    def _attention_places(self) -> dict[str, str]:
        """Names of the attention modules, to their names within their blocks if the blocks are known."""
        return {name: name for name, module in self._model.named_modules() if hasattr(module, "processor")}

    def _attends_again(self, attentions: dict[str, nn.Module]) -> dict[str, Callable[..., Tensor]]:
        """Functions for all attention calls but the first, for modules that may attend more than once in a forward."""
        return {}

    @abstractmethod
    def _attend(self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Replaces ``scaled_dot_product_attention`` (``[B, H, S_local, D]``) in the module of this name."""

    def _local(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """Attention whose keys are all on this rank."""
        return attention(q, k, v, mask, scale, self._backend)
