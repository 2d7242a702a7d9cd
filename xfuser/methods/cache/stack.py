"""A cache over all of a transformer's blocks that this rank has: they run, or what they added last is added again.

Under PipeFusion, the first stage decides, and a flag travels with its tokens to the others. Each stage adds what its
own blocks added; the sum over the stages is what all blocks added.
"""

from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from xfuser.call import CallState
from xfuser.core.hooks import Arguments, Binder
from xfuser.models.plan import Block, ModelPlan, Streams

HOOK = "xfuser_stack_cache"

Carried = dict[str, Tensor]  # tokens of each stream, [B, own tokens, D]


class StackState:
    """The state of one forward of a step, and of one patch if there are several.

    Attributes:
        added: what the blocks that may be skipped added when they last ran.
        begin: the input of the first of these blocks.
        signal, total: state of the rule.
    """

    def __init__(self) -> None:
        self.added: Carried = {}
        self.begin: Carried = {}
        self.signal: Any = None
        self.total = 0.0


class Rule(Protocol):
    """Decides whether to skip blocks.

    Attributes:
        behind_first: whether the rule uses what the first block adds to its tokens; this block then always runs.
    """

    behind_first: bool

    def skips(self, state: StackState, block: nn.Module, given: Arguments, image: Tensor) -> bool:
        """Whether to skip blocks.

        Args:
            block, given: the transformer's first block, and its arguments.
            image: the block's input tokens of the image, or what it added to them, ``[B, own tokens, D]``.
        """


class BlockStack:
    """The blocks of one transformer on this rank, during a call.

    Args:
        blocks: the blocks in order of execution.
        rule: the rule if this rank has the transformer's first block; else None.
    """

    def __init__(self, plan: ModelPlan, blocks: list[Block], rule: Rule | None, call: CallState) -> None:
        self._plan, self._blocks, self._rule, self._call = plan, blocks, rule, call
        self._states: dict[tuple[int, int | None], StackState] = {}
        self.forget = self._states.clear

    def hook(self) -> None:
        """Register hooks that may skip the blocks, until the call ends."""
        self._call.skips = False
        for block in self._blocks:
            registry = HookRegistry.check_if_exists_or_initialize(block.module)
            registry.register_hook(StackHook(self, block), HOOK)
            self._call.callback(registry.remove_hook, HOOK, recurse=False)

    def run(self, block: Block, original: Any, given: Arguments) -> Any:
        """Return the output of a block, run or skipped."""
        call, state, first, output = self._call, self._state(), block is self._blocks[0], None
        streams = self._given(block, given)
        if first and self._rule:
            image = streams["image"]
            if self._rule.behind_first:
                output = original(**given)
                streams = self._returned(block, output)
                image = streams["image"] - image
            call.skips = self._rule.skips(state, block.module, given, image)
        if first:
            state.begin = streams
        if call.skips:
            return self._packed(block, {k: x + state.added[k] for k, x in streams.items()} if first else streams)
        output = original(**given) if output is None else output
        if block is self._blocks[-1]:
            end, begin, state.begin = self._returned(block, output), state.begin, {}
            state.added = {stream: x - begin[stream] for stream, x in end.items()}
        return output

    def _state(self) -> StackState:
        call = self._call
        patch = None if call.synchronous or call.patches == 1 else call.patch
        return self._states.setdefault((call.index, patch), StackState())

    def _given(self, block: Block, given: Arguments) -> Carried:
        found: Carried = {}
        for name, streams in self._plan.carriers(block.list_name).items():
            found |= self._split(given[name], streams)
        return found

    def _returned(self, block: Block, output: Any) -> Carried:
        found: Carried = {}
        tensors = [output] if isinstance(output, Tensor) else output
        for x, streams in zip(tensors, self._plan.outputs(block.list_name), strict=True):
            found |= self._split(x, streams)
        return found

    def _split(self, x: Tensor, streams: Streams) -> Carried:
        if len(streams) == 1:
            return {streams[0]: x}
        shares = self._call.tokens
        parts = x.split([shares.sizes[stream][shares.rank] for stream in streams], dim=1)
        return dict(zip(streams, parts, strict=True))

    def _packed(self, block: Block, carried: Carried) -> Any:
        """The tokens in the form that the block returns."""
        outputs = self._plan.outputs(block.list_name)
        tensors = [torch.cat([carried[one] for one in streams], dim=1) for streams in outputs]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


class StackHook(ModelHook):
    """The hook on one block of a :class:`BlockStack`."""

    _is_stateful = True

    def __init__(self, stack: BlockStack, block: Block) -> None:
        super().__init__()
        self.stack, self._block, self._bind = stack, block, Binder(block.module.forward)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the block's forward."""
        return self.stack.run(self._block, self.fn_ref.original_forward, self._bind(args, kwargs))

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Reset the state of the whole stack."""
        self.stack.forget()
        return module
