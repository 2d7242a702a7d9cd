"""A diffusion transformer of its own kind, that Diffusers does not know: the model of these tutorials."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, TEXT = 48, 4, 16


class Attention(nn.Module):
    """Joint attention: text tokens first, then those of the image, which are turned by their places."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, text: torch.Tensor, image: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(text, image, places)))

    def heads(self, text: torch.Tensor, image: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values, ``[B, heads, text + image, D]``."""
        tokens = torch.cat([text, image], dim=1)
        q, k, v = self.qkv(tokens).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        words = text.shape[1]
        q, k = (torch.cat([x[:, :, :words], x[:, :, words:] * places], dim=2) for x in (q, k))
        return [q, k, v]

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(
        self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended = self.attention(self.norm(text) + time, self.norm(image) + time, places)
        tokens = torch.cat([text, image], dim=1) + attended
        tokens = tokens + self.mlp(self.norm_2(tokens))
        return tokens[:, text.shape[1] :], tokens[:, : text.shape[1]]


class ToyDiT(nn.Module):
    """``latents [B, 4, H, W]``, ``time [B]`` in (0, 1000] and ``text [B, T, 16]`` to ``[B, 4, H, W]``."""

    patch_size = 2

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(4, WIDTH, 2, stride=2)
        self.embed_text, self.embed_time = nn.Linear(TEXT, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 4 * 2 * 2)

    def forward(self, latents: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        grid = self.embed(latents)
        image, text = grid.flatten(2).transpose(1, 2), self.embed_text(text)
        time = self.embed_time(time[:, None] / 1000)[:, None]
        angles = torch.arange(image.shape[1])[:, None] * torch.linspace(0.1, 1, WIDTH // HEADS)
        for block in self.blocks:
            image, text = block(image, text, time, angles.cos())
        pixels = self.head(image).unflatten(1, grid.shape[2:]).unflatten(3, (4, 2, 2))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def seeded_model() -> ToyDiT:
    """The same weights on every rank."""
    torch.manual_seed(0)
    model = ToyDiT().eval()
    for block in model.blocks:
        block.attention.qkv.weight.data.mul_(3)  # so that attention matters, in a model that has learned nothing
    return model


def seeded_inputs(rows: int = 1, words: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of 5 x 3 tokens, and text."""
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator}
    return torch.randn(rows, 4, 10, 6, **draw), torch.randn(rows, words, TEXT, **draw)


def report(parallel: torch.Tensor, serial: torch.Tensor) -> None:
    """Print the relative error, and fail if the two are not the same."""
    error = ((parallel - serial).abs().max() / serial.abs().max()).item()
    if torch.distributed.get_rank() == 0:
        print(f"relative error against one rank: {error:.1e}", flush=True)
    assert error < 1e-5
