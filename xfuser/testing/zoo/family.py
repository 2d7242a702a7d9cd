"""A family of the zoo, and helpers that several families share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

HEADS, HEAD_DIM = 3, 8
WIDTH = HEADS * HEAD_DIM
TEXT = 16  # features of a text token
WORDS = 7  # text tokens
HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
VIDEO = (4, 3, 10, 6)  # 45 tokens

PROJECTIONS = ("to_q", "to_k", "to_qkv_mlp_proj", "add_q_proj", "add_k_proj", "to_query", "to_key", "to_q_t", "to_k_t")

Inputs = dict[str, Any]
FRACTION: Callable[[torch.Tensor], torch.Tensor] = lambda t: t / 1000  # noqa: E731


@dataclass(frozen=True)
class Family:
    """One transformer class.

    Attributes:
        cls: its name in Diffusers.
        models: well-known models of this class.
        config: configuration of the tiny transformer.
        latents: shape of the latents of one batch entry.
        conditions: ``(transformer, rows, draw)`` to the arguments of the forward except latents and timestep;
            ``draw(*shape)`` returns seeded noise that differs between batch entries.
        time: name of the timestep argument.
        timestep: converts timesteps, ``[rows]`` in (0, 1000], to the argument that the class takes.
        scaled: whether projections are scaled up; false where attention has enough effect without, as scaling would
            amplify rounding.
    """

    cls: str
    models: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    conditions: Callable[[Any, int, Callable[..., torch.Tensor]], Inputs]
    time: str = "timestep"
    timestep: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    scaled: bool = True

    @property
    def present(self) -> bool:
        """Whether the installed Diffusers has the class."""
        return hasattr(diffusers, self.cls)

    def build(self) -> Any:
        """Build the transformer; queries and keys are scaled up so that attention affects the output."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**self.config).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            _make_felt(name, weight, self.scaled)
        return model


def _make_felt(name: str, weight: torch.Tensor, scaled: bool) -> None:
    """Replace zero initialisations (such as gates) and uninitialised weights, and scale queries and keys up."""
    if not weight.any() or name.endswith(
        ("scale_shift_table", "pad_token", "experts.gate_up_proj", "experts.down_proj")
    ):
        torch.nn.init.normal_(weight, std=0.3)
    if not scaled:
        return
    if weight.dim() == 2 and name.endswith(tuple(f"{kind}.weight" for kind in PROJECTIONS)):
        weight.data.mul_(4)
    if weight.dim() == 2 and name.endswith(("to_v.weight", "add_v_proj.weight", "norm1.linear.weight")):
        weight.data.mul_(3)


def text(model: Any, rows: int, draw: Callable) -> Inputs:
    """Return only text embeddings."""
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)}


def key_mask(rows: int, words: int) -> torch.Tensor:
    """Return ``[rows, words]`` with zeros at the end: two in the first row, one less in each following row."""
    hidden = min(2, words - 1)
    shown = torch.ones(rows, words, dtype=torch.long)
    for row in range(rows):
        shown[row, words - max(hidden - row, 0) :] = 0
    return shown
