"""The training stages of the autoencoder, and helpers that all stages share."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from models import build_vae
from torch.nn import functional

from xfuser.testing.shapes.scenes import Scene, all_renders, draw, parse, place, render, sample_scene


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Convert uint8 images [n, h, w, 3] to a float tensor [n, 3, h, w] from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def warm_cosine(step: int, steps: int, warmup: int = 50, floor: float = 0.02) -> float:
    """Return the learning rate factor at a step: linear warm-up, then cosine decay."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))


def save_checkpoint(path: Path, **state) -> None:
    """Write a checkpoint atomically, so that an interrupted write does not damage the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class CropPool:
    """Full-size images, and crops of them that show an object's edge."""

    def __init__(self, rng: np.random.Generator, pictures: int, size: int = 256):
        self.rng, self.size = rng, size
        self.objects, self.pictures = [], np.empty((pictures, size, size, 3), np.uint8)
        for index in range(pictures):
            scene = sample_scene(rng)
            self.objects.append(place(scene, rng))
            self.pictures[index] = np.asarray(draw(self.objects[-1], scene.background, size))

    def crops(self, count: int, side: int) -> torch.Tensor:
        """Crop `count` squares of `side` pixels around points on the outlines of objects."""
        cut = []
        for index in self.rng.integers(len(self.pictures), size=count):
            item = self.objects[index][self.rng.integers(len(self.objects[index]))]
            angle, radius = self.rng.uniform(0, 2 * math.pi), item.diameter / 2 * self.rng.uniform(0.8, 1.4)
            x, y = item.x + radius * math.cos(angle), item.y + radius * math.sin(angle)
            left, top = (int(np.clip(v * self.size - side / 2, 0, self.size - side)) for v in (x, y))
            cut.append(self.pictures[index, top : top + side, left : left + side])
        return to_tensor(np.stack(cut))

    def whole(self, count: int) -> torch.Tensor:
        """Return `count` full-size images."""
        return to_tensor(self.pictures[self.rng.integers(len(self.pictures), size=count)])


def difference(decoded: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Return the L1 + L2 loss of decoded images."""
    return functional.l1_loss(decoded, pictures) + functional.mse_loss(decoded, pictures)


def autoencoder_loss(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Return the L1 + L2 loss of the reconstruction, plus a small KL term that pulls the latents to a unit normal."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return difference(decoded, pictures) + 1e-3 * divergence


@torch.no_grad()
def reconstruction_psnr(vae, pictures: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of reconstructed images, in decibels."""
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return 10 * math.log10(4.0 / functional.mse_loss(decoded, pictures).item())


def train_vae(work: Path, steps: int, seed: int) -> None:
    """Train the autoencoder: first on crops near edges, in the last quarter on full-size images."""
    torch.manual_seed(seed)
    pool = CropPool(np.random.default_rng(seed), 600)
    held_out = CropPool(np.random.default_rng(seed + 1), 16).whole(16)
    vae, path, start = build_vae(), work / "vae.pt", 0
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    if path.exists():
        state = torch.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.time()
    for step in range(start, steps):
        pictures = pool.crops(16, 64) if step < 0.75 * steps else pool.whole(2)
        optimizer.param_groups[0]["lr"] = 2e-3 * warm_cosine(step, steps)
        loss = autoencoder_loss(vae, pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step + 1 == steps:
            psnr = reconstruction_psnr(vae, held_out)
            print(f"vae {step} loss {loss.item():.4f} psnr {psnr:.2f} {time.time() - began:.0f}s", flush=True)
            save_checkpoint(path, vae=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    normalise_latents(vae, pool.whole(48))
    save_checkpoint(work / "vae-final.pt", vae=vae.state_dict())


@torch.no_grad()
def normalise_latents(vae, pictures: torch.Tensor) -> None:
    """Fold a normalisation of the latent channels to zero mean and unit deviation into the 1x1 convolutions."""
    means = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(8)])
    shift, scale = means.mean((0, 2, 3)), means.std((0, 2, 3))
    encode, decode, channels = vae.quant_conv, vae.post_quant_conv, len(shift)
    encode.weight[:channels].div_(scale[:, None, None, None])
    encode.bias[:channels].sub_(shift).div_(scale)
    encode.bias[channels:].sub_(2 * scale.log())
    decode.bias.add_((decode.weight[:, :, 0, 0] * shift).sum(1))
    decode.weight.mul_(scale[None, :, None, None])


def load_vae(work: Path):
    """Return the finished autoencoder."""
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae-final.pt")["vae"])
    return vae.eval().requires_grad_(False)


def nearest_true(decoded: torch.Tensor, scene: Scene) -> np.ndarray:
    """Return the true image of a scene, over all its shifts, that is closest to a generated image `[3, H, W]`."""
    shown = decoded.permute(1, 2, 0).add(1).mul(127.5).numpy()
    true = [np.asarray(picture) for picture in all_renders(scene, shown.shape[0])]
    return min(true, key=lambda picture: np.square(picture - shown).sum())


def train_decoder(work: Path, steps: int, rate: float, seed: int, batch: int = 2) -> None:
    """Train only the decoder on true outlines, half of the steps on latents that the transformers generated."""
    torch.manual_seed(seed)
    vae, rng = load_vae(work), np.random.default_rng(seed)
    drawn = [torch.load(path) for path in sorted(work.glob("drawn-*.pt"))]
    latents = torch.cat([part["latents"] for part in drawn]).float()
    scenes = [parse(text) for part in drawn for text in part["captions"]]
    with torch.no_grad():
        true = [
            nearest_true(vae.decode(one[None]).sample[0], scene) for one, scene in zip(latents, scenes, strict=True)
        ]
    true, began, losses = to_tensor(np.stack(true)), time.time(), []
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW([one.requires_grad_() for one in decoder], betas=(0.9, 0.99), weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * warm_cosine(step, steps)
        if step % 2:
            pictures = to_tensor(np.stack([np.asarray(render(sample_scene(rng), 256, rng)) for _ in range(batch)]))
            with torch.no_grad():
                given = vae.encode(pictures).latent_dist.mode()
        else:
            chosen = torch.from_numpy(rng.integers(len(scenes), size=batch))
            given, pictures = latents[chosen], true[chosen]
        loss = difference(vae.decode(given).sample, pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder, 1.0)
        optimizer.step()
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 0.02)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            own, others = np.mean(losses[1::2]), np.mean(losses[::2])
            print(f"decoder {step + 1} true {own:.4f} drawn {others:.4f} {time.time() - began:.0f}s", flush=True)
            losses.clear()
    save_checkpoint(work / "vae-final.pt", vae=average)
