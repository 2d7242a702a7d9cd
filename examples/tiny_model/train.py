"""Train the tiny text-to-image model on a processor, stage by stage; see README.md for the order."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import PixArtSigmaPipeline
from models import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from scenes import SYNONYMS, caption, draw, parse, place, render, sample_scene
from torch import nn
from torch.nn import functional


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """Turn uint8 pictures [n, h, w, 3] into a float tensor [n, 3, h, w] from -1 to 1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def warm_cosine(step: int, steps: int, warmup: int = 50, floor: float = 0.02) -> float:
    """Return the learning rate's factor at a step: up in a straight line, down along a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (steps - warmup))))


def save_checkpoint(path: Path, **state) -> None:
    """Write a checkpoint so that an interrupted write never spoils the last one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


# ---- autoencoder -------------------------------------------------------------------------------------------


class CropPool:
    """Pictures at full size, and crops of them which show an object's edge."""

    def __init__(self, rng: np.random.Generator, pictures: int, size: int = 256):
        self.rng, self.size = rng, size
        self.objects, self.pictures = [], np.empty((pictures, size, size, 3), np.uint8)
        for index in range(pictures):
            scene = sample_scene(rng)
            self.objects.append(place(scene))
            self.pictures[index] = np.asarray(draw(self.objects[-1], scene.background, size))

    def crops(self, count: int, side: int) -> torch.Tensor:
        """Cut `count` squares of `side` pixels around points on objects' outlines."""
        cut = []
        for index in self.rng.integers(len(self.pictures), size=count):
            item = self.objects[index][self.rng.integers(len(self.objects[index]))]
            angle, radius = self.rng.uniform(0, 2 * math.pi), item.diameter / 2 * self.rng.uniform(0.8, 1.4)
            x, y = item.x + radius * math.cos(angle), item.y + radius * math.sin(angle)
            left, top = (int(np.clip(v * self.size - side / 2, 0, self.size - side)) for v in (x, y))
            cut.append(self.pictures[index, top : top + side, left : left + side])
        return to_tensor(np.stack(cut))

    def whole(self, count: int) -> torch.Tensor:
        """Return `count` whole pictures."""
        return to_tensor(self.pictures[self.rng.integers(len(self.pictures), size=count)])


def autoencoder_loss(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Return L1 + L2 of the reconstruction, plus a little pull of the latents towards a unit normal."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1.0 - posterior.logvar).mean()
    return functional.l1_loss(decoded, pictures) + functional.mse_loss(decoded, pictures) + 1e-3 * divergence


@torch.no_grad()
def reconstruction_psnr(vae, pictures: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of reconstructed pictures, in decibels."""
    decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    return 10 * math.log10(4.0 / functional.mse_loss(decoded, pictures).item())


def train_vae(work: Path, steps: int, seed: int) -> None:
    """Train the autoencoder: first on crops near edges, in the last quarter on whole pictures."""
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
    """Fold into the 1x1 convolutions what gives each latent channel zero mean and unit deviation."""
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


# ---- latents -----------------------------------------------------------------------------------------------


def cache_latents(work: Path, size: int, count: int, seed: int, shard: int = 1024, batch: int = 4) -> None:
    """Draw scenes the training may see and write their latents and plain captions in shards."""
    vae = load_vae(work)
    for index in range(count // shard):
        path = work / f"latents-{size}-{index:03d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((seed, size, index))
        scenes = [sample_scene(rng) for _ in range(shard)]
        latents = []
        for first in range(0, shard, batch):
            pictures = np.stack([np.asarray(render(scene, size)) for scene in scenes[first : first + batch]])
            with torch.no_grad():
                latents.append(vae.encode(to_tensor(pictures)).latent_dist.mode().half())
        save_checkpoint(path, latents=torch.cat(latents), captions=[caption(scene) for scene in scenes])
        print(path.name, flush=True)


class Latents:
    """Cached latents and their scenes."""

    def __init__(self, work: Path, size: int, rng: np.random.Generator):
        self.work, self.size, self.rng = work, size, rng
        self.read()

    def read(self) -> None:
        """Read all shards, among them those that were written meanwhile."""
        shards = [torch.load(path) for path in sorted(self.work.glob(f"latents-{self.size}-*.pt"))]
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.scenes = [parse(text) for shard in shards for text in shard["captions"]]

    def batch(self, count: int, drop: float) -> tuple[torch.Tensor, list[str]]:
        """Return latents, and captions of which a share `drop` is left empty."""
        indices = self.rng.integers(len(self.scenes), size=count)
        texts = [caption(self.scenes[i], self.rng) if self.rng.random() >= drop else "" for i in indices]
        return self.latents[torch.from_numpy(indices)].float(), texts


# ---- text encoder ------------------------------------------------------------------------------------------


def tokenize(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token numbers and the mask of those which are no padding."""
    tokens = tokenizer(texts, padding="longest", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


class ThumbnailHead(nn.Module):
    """Draws 32 x 32 thumbnails from encoded captions: what the text encoder practises on."""

    def __init__(self, grid: int = 4, patch: int = 8):
        super().__init__()
        self.grid, self.patch = grid, patch
        self.places = nn.Parameter(torch.randn(grid * grid, TEXT_WIDTH))
        layer = nn.TransformerDecoderLayer(
            TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.paint = nn.Linear(TEXT_WIDTH, 3 * patch * patch)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = self.places.expand(len(states), -1, -1)
        painted = self.paint(self.decoder(places, states, memory_key_padding_mask=mask == 0))
        painted = painted.view(-1, self.grid, self.grid, 3, self.patch, self.patch)
        side = self.grid * self.patch
        return painted.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side, side)


def train_text(work: Path, steps: int, batch: int, seed: int) -> None:
    """Teach the text encoder to place colours, with a head that draws thumbnails and is then dropped."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = build_tokenizer()
    encoder, head = build_text_encoder(len(tokenizer)), ThumbnailHead()
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=2e-3, weight_decay=0.01)
    began = time.time()
    for step in range(steps):
        scenes = [sample_scene(rng) for _ in range(batch)]
        pictures = to_tensor(np.stack([np.asarray(render(scene, 32)) for scene in scenes]))
        tokens, mask = tokenize(tokenizer, [caption(scene, rng) for scene in scenes])
        optimizer.param_groups[0]["lr"] = 2e-3 * warm_cosine(step, steps)
        states = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        loss = functional.mse_loss(head(states, mask), pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"text {step} loss {loss.item():.4f} {time.time() - began:.0f}s", flush=True)
    save_checkpoint(work / "text.pt", encoder=encoder.state_dict())


# ---- going on from a pipeline --------------------------------------------------------------------------------


def start(work: Path, folder: Path) -> None:
    """Write the checkpoints to go on from an exported pipeline; new words mean what those do that they stand for."""
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    save_checkpoint(work / "vae-final.pt", vae=pipeline.vae.state_dict())
    known, tokenizer = pipeline.tokenizer.get_vocab(), build_tokenizer()
    rows = [known.get(word, known.get(stands_for(word), known["picture"])) for word in _by_number(tokenizer)]
    encoder, weights = build_text_encoder(len(tokenizer)), pipeline.text_encoder.state_dict()
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in weights:
            weights[name] = weights[name][rows]
    encoder.load_state_dict(weights)
    parts = nn.ModuleDict({"encoder": encoder, "transformer": pipeline.transformer}).state_dict()
    save_checkpoint(work / "text.pt", encoder=encoder.state_dict())
    save_checkpoint(work / "transformer.pt", parts=parts, average=parts, step=0, optimizers=[])


def _by_number(tokenizer) -> list[str]:
    return sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)


def stands_for(word: str) -> str:
    """Return the first word of that which this one is a synonym of, or is part of a synonym of; "" if it is none."""
    heads = [head for head, texts in SYNONYMS.items() if any(word in text.split() for text in texts)]
    return heads[0].split()[0] if heads else ""


# ---- transformer -------------------------------------------------------------------------------------------


class _Bfloat16Linear(torch.autograd.Function):
    """A linear layer whose products alone are in bfloat16: some processors have units for just that."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        rows, weight = inputs.reshape(-1, inputs.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(rows, weight)
        return torch.add(rows @ weight.T, bias).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        outer = gradient.reshape(-1, gradient.shape[-1])
        low = outer.bfloat16()
        inputs = (low @ weight).float().view(*gradient.shape[:-1], -1)
        return inputs, (low.T @ rows).float(), outer.sum(0)


def attend_in_bfloat16(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Scaled dot product attention with all its products in bfloat16, half the time of the fused one."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale).bfloat16() @ key.bfloat16().transpose(-1, -2)
    if attn_mask is not None:
        scores = scores + attn_mask.bfloat16()
    return (scores.softmax(-1) @ value.bfloat16()).to(query.dtype)


def use_bfloat16_products(transformer) -> None:
    """Compute the large products of a transformer's blocks, and all attention, in bfloat16 while it trains."""
    for module in transformer.transformer_blocks.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda inputs, m=module: _Bfloat16Linear.apply(inputs, m.weight, m.bias)
    functional.scaled_dot_product_attention = attend_in_bfloat16


class Trainer:
    """The text encoder and the transformer with their optimizers, their averages and their checkpoint."""

    def __init__(self, work: Path, rates: tuple[float, float, float]):
        self.path, self.step = work / "transformer.pt", 0
        self.tokenizer = build_tokenizer()
        self.parts = nn.ModuleDict(
            {"encoder": build_text_encoder(len(self.tokenizer)), "transformer": build_transformer()}
        )
        self.parts["encoder"].load_state_dict(torch.load(work / "text.pt")["encoder"])
        self.average = {name: value.clone() for name, value in self.parts.state_dict().items()}
        self.optimizers = self._build_optimizers(rates)
        if self.path.exists():
            self._load()

    def _build_optimizers(self, rates: tuple[float, float, float]) -> list[torch.optim.Optimizer]:
        """Give the matrices of the transformer's blocks to Muon and all else to AdamW."""
        transformer, encoder = self.parts["transformer"], self.parts["encoder"]
        blocks = transformer.transformer_blocks.named_parameters()
        matrices = [value for name, value in blocks if value.ndim == 2 and "table" not in name]
        chosen = {id(value) for value in matrices}
        others = [value for value in transformer.parameters() if id(value) not in chosen]
        groups = [
            {"params": others, "rate": rates[0]},
            {"params": list(encoder.parameters()), "rate": rates[1]},
        ]
        return [
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.Muon(
                [{"params": matrices, "rate": rates[2]}], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
        ]

    def _load(self) -> None:
        """Go on from the checkpoint, at the rates asked for now."""
        state = torch.load(self.path)
        self.parts.load_state_dict(state["parts"])
        self.average, self.step = state["average"], state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=False):  # none at a new start
            rates = [group["rate"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["rate"] = rate

    def save(self) -> None:
        """Write the checkpoint."""
        save_checkpoint(
            self.path,
            parts=self.parts.state_dict(),
            average=self.average,
            step=self.step,
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
        )

    def loss(self, latents: torch.Tensor, texts: list[str], shift: float) -> torch.Tensor:
        """Return the error of the predicted clean latents, weighted as an error of the flow would be."""
        tokens, mask = tokenize(self.tokenizer, texts)
        states = self.parts["encoder"](input_ids=tokens, attention_mask=mask).last_hidden_state
        level = (torch.arange(len(latents)) + torch.rand(len(latents))) / len(latents)
        level = (shift * level / (1 + (shift - 1) * level)).clamp(0.001, 0.9999)
        sigma = level[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * torch.randn_like(latents)
        predicted = self.parts["transformer"](
            noisy,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=(level * 1000).long(),
            return_dict=False,
        )[0]
        return ((predicted - latents) / sigma.clamp(min=0.1)).square().mean()

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """Take one step of all optimizers, at their rates times `factor`, and follow with the averages."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        follow = min(0.995, self.step / (self.step + 20))
        for name, value in self.parts.state_dict().items():
            self.average[name].lerp_(value, 1 - follow)


def train_transformer(args: argparse.Namespace) -> None:
    """Train text encoder and transformer together on cached latents, up to step `args.steps`."""
    torch.manual_seed(args.seed)
    trainer = Trainer(args.work, tuple(args.rates))
    torch.manual_seed(args.seed + trainer.step)
    data = Latents(args.work, args.size, np.random.default_rng((args.seed, trainer.step)))
    if args.bfloat16:
        use_bfloat16_products(trainer.parts["transformer"])
    first, began, losses = trainer.step, time.time(), []
    while trainer.step < args.steps:
        ahead = min(1.0, (args.steps - trainer.step) / max(1, args.cooldown))
        latents, texts = data.batch(args.batch, drop=0.1)
        loss = trainer.loss(latents, texts, args.shift)
        trainer.update(loss, ahead * min(1.0, (trainer.step - first + 1) / 50))
        losses.append(loss.item())
        if trainer.step % 50 == 0 or trainer.step == args.steps:
            seconds = time.time() - began
            print(f"{args.size} px {trainer.step} loss {np.mean(losses):.4f} {seconds:.0f}s", flush=True)
            losses.clear()
            trainer.save()
            data.read()


# ---- export ------------------------------------------------------------------------------------------------


def export(work: Path, folder: Path) -> None:
    """Write the averaged weights as a pipeline folder, stored in half and loaded in single precision."""
    trained = nn.ModuleDict({"encoder": build_text_encoder(len(build_tokenizer())), "transformer": build_transformer()})
    trained.load_state_dict(torch.load(work / "transformer.pt")["average"])
    pipeline = PixArtSigmaPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=trained["encoder"],
        vae=load_vae(work),
        transformer=trained["transformer"],
        scheduler=build_scheduler(),
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.half).save_pretrained(partial)
    # Diffusers' own models load in single precision, so the text encoder must; and tokenizers are written
    # under a class name which Transformers 4 does not know.
    edit_json(partial / "text_encoder" / "config.json", dtype="float32")
    edit_json(partial / "tokenizer" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(partial / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def edit_json(path: Path, **changes) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("vae", "cache", "text", "start", "transformer", "export"))
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_model"), help="where checkpoints are kept")
    parser.add_argument("--steps", type=int, default=1600, help="steps of the stage in all, resumed ones included")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=128, help="pictures' side in pixels")
    parser.add_argument("--count", type=int, default=8192, help="pictures to cache")
    parser.add_argument("--rates", type=float, nargs=3, default=(1e-3, 1e-3, 1e-3), help="others, text, matrices")
    parser.add_argument("--cooldown", type=int, default=0, help="steps at the end in which the rates fall to 0")
    parser.add_argument("--shift", type=float, default=2.0, help="how far training leans to high noise")
    parser.add_argument("--bfloat16", action="store_true", help="compute the blocks' products in bfloat16")
    parser.add_argument(
        "--folder", type=Path, default=Path("shapes-256"), help="the pipeline to write or to start from"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "vae":
        train_vae(args.work, args.steps, args.seed)
    elif args.stage == "cache":
        cache_latents(args.work, args.size, args.count, args.seed)
    elif args.stage == "text":
        train_text(args.work, args.steps, args.batch, args.seed)
    elif args.stage == "start":
        start(args.work, args.folder)
    elif args.stage == "transformer":
        train_transformer(args)
    else:
        export(args.work, args.folder)


if __name__ == "__main__":
    main()
