"""Train the tiny text-to-image models on a CPU, stage by stage; see README.md for the order."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from autoencoder import load_vae, save_checkpoint, to_tensor, train_decoder, train_vae, warm_cosine
from diffusers import PixArtSigmaPipeline
from families import FAMILIES, Flux, GuidedFlux, PixArt, tokenize
from models import TEXT_WIDTH, build_text_encoder, build_tokenizer
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModel

from xfuser.testing.shapes.scenes import SYNONYMS, caption, parse, render, sample_scene

# ---- latents -----------------------------------------------------------------------------------------------


def cache_latents(args: argparse.Namespace, shard: int = 1024, batch: int = 4) -> None:
    """Render scenes that are not held out, and write their latents and plain captions in shards."""
    work, size = args.work, args.size
    vae = load_vae(work)
    for index in range(args.count // shard):
        path = work / f"latents-{size}-{index:03d}.pt"
        if path.exists():
            continue
        rng = np.random.default_rng((args.seed, size, index))
        scenes = [sample_scene(rng) for _ in range(shard)]
        latents = []
        for first in range(0, shard, batch):
            chosen = scenes[first : first + batch]
            pictures = np.stack([np.asarray(render(scene, size, rng)) for scene in chosen])
            with torch.no_grad():
                latents.append(vae.encode(to_tensor(pictures)).latent_dist.mode().half())
        save_checkpoint(path, latents=torch.cat(latents), captions=[caption(scene) for scene in scenes])
        print(path.name, flush=True)


class Latents:
    """Cached latents and their scenes; single objects, which vary most in size, are sampled three times as often."""

    def __init__(self, work: Path, size: int, rng: np.random.Generator):
        self.work, self.size, self.rng = work, size, rng
        self.read()

    def read(self) -> None:
        """Read all shards, including those written in the meantime."""
        shards = [torch.load(path) for path in sorted(self.work.glob(f"latents-{self.size}-*.pt"))]
        self.latents = torch.cat([shard["latents"] for shard in shards])
        self.scenes = [parse(text) for shard in shards for text in shard["captions"]]
        shares = np.array([3.0 if sum(group.count for group in scene.groups) == 1 else 1.0 for scene in self.scenes])
        self.shares = shares / shares.sum()

    def batch(self, count: int, drop: float) -> tuple[torch.Tensor, list[str]]:
        """Return latents and captions; a fraction `drop` of the captions is empty."""
        indices = self.rng.choice(len(self.scenes), size=count, p=self.shares)
        texts = [caption(self.scenes[i], self.rng) if self.rng.random() >= drop else "" for i in indices]
        return self.latents[torch.from_numpy(indices)].float(), texts


# ---- text encoder ------------------------------------------------------------------------------------------


class ThumbnailHead(nn.Module):
    """Decodes encoded captions to 32 x 32 thumbnails, to pretrain the text encoder."""

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
    """Pretrain the text encoder to place colours, with a thumbnail head that is dropped afterwards."""
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


# ---- start from a pipeline -----------------------------------------------------------------------------------


def start(work: Path, folder: Path) -> None:
    """Write checkpoints from an exported pipeline to continue training; new words copy the words they stand for."""
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
    """Return the first word of the entry that `word` is a synonym of, or part of a synonym of; "" if there is none."""
    heads = [head for head, texts in SYNONYMS.items() if any(word in text.split() for text in texts)]
    return heads[0].split()[0] if heads else ""


# ---- transformer -------------------------------------------------------------------------------------------


class _Bfloat16Linear(torch.autograd.Function):
    """A linear layer that computes only its products in bfloat16, for CPUs with units for them."""

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


def attend_in_bfloat16(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Scaled dot product attention with all its products in bfloat16; takes half the time of the fused kernel."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale).bfloat16() @ key.bfloat16().transpose(-1, -2)
    if attn_mask is not None:
        scores = scores + attn_mask.bfloat16()
    return (scores.softmax(-1) @ value.bfloat16()).to(query.dtype)


def use_bfloat16_products(transformer) -> None:
    """Compute the large products of a transformer's blocks, and all attention, in bfloat16 during training."""
    for name, module in transformer.named_modules():
        if "blocks." in name and isinstance(module, nn.Linear):
            module.forward = lambda inputs, m=module: _Bfloat16Linear.apply(inputs, m.weight, m.bias)
    functional.scaled_dot_product_attention = attend_in_bfloat16


class Trainer:
    """The text encoders and the transformer with their optimizers, weight averages and checkpoint."""

    def __init__(self, work: Path, family: PixArt | Flux, rates: tuple[float, float, float]):
        self.family, self.path, self.step = family, work / f"{family.name}.pt", 0
        self.parts, self.teacher = family.build(), None
        self.parts["encoder"].load_state_dict(torch.load(work / "text.pt")["encoder"])
        if isinstance(family, GuidedFlux):
            self.teacher = family.build().requires_grad_(False)
            for parts in (self.teacher, self.parts):
                parts.load_state_dict(torch.load(work / f"{family.teacher}.pt")["average"])
        self.average = {name: value.clone() for name, value in self.parts.state_dict().items()}
        self.optimizers = self._build_optimizers(rates)
        if self.path.exists():
            self._load()

    def _build_optimizers(self, rates: tuple[float, float, float]) -> list[torch.optim.Optimizer]:
        """Use Muon for the matrices of the transformer's blocks and AdamW for all other parameters."""
        matrices, others, texts = [], [], []
        for name, value in self.parts.named_parameters():
            if not name.startswith("transformer."):
                texts.append(value)
            elif "blocks." in name and value.ndim == 2 and "table" not in name:
                matrices.append(value)
            else:
                others.append(value)
        groups = [{"params": others, "rate": rates[0]}, {"params": texts, "rate": rates[1]}]
        return [
            torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.Muon(
                [{"params": matrices, "rate": rates[2]}], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            ),
        ]

    def _load(self) -> None:
        """Resume from the checkpoint, with the learning rates of this run."""
        state = torch.load(self.path)
        self.parts.load_state_dict(state["parts"])
        self.average, self.step = state["average"], state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=False):  # empty after `start`
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
        """Return the error of the predicted clean latents, weighted like an error of the flow."""
        level = (torch.arange(len(latents)) + torch.rand(len(latents))) / len(latents)
        level = (shift * level / (1 + (shift - 1) * level)).clamp(0.001, 0.9999)
        sigma = level[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * torch.randn_like(latents)
        if self.teacher is None:
            predicted, wanted = self.family.predict(self.parts, noisy, level, texts), latents
        else:
            guidance = 1 + 4 * torch.rand(len(latents))
            predicted = self.family.predict(self.parts, noisy, level, texts, guidance)
            wanted = self.family.teach(self.teacher, noisy, level, texts, guidance)
        return ((predicted - wanted) / sigma.clamp(min=0.1)).square().mean()

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """Take one step of all optimizers, at their rates times `factor`, and update the averages."""
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
    """Train the text encoders and the transformer together on cached latents, up to step `args.steps`."""
    torch.manual_seed(args.seed)
    trainer = Trainer(args.work, FAMILIES[args.family](), tuple(args.rates))
    torch.manual_seed(args.seed + trainer.step)
    data = Latents(args.work, args.size, np.random.default_rng((args.seed, trainer.step)))
    if args.bfloat16:
        for parts in filter(None, (trainer.parts, trainer.teacher)):
            use_bfloat16_products(parts["transformer"])
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


def load_pipeline(work: Path, family: PixArt | Flux):
    """Return the pipeline with the averaged weights."""
    trained = family.build()
    trained.load_state_dict(torch.load(work / f"{family.name}.pt")["average"])
    return family.pipeline(trained.eval(), load_vae(work))


def draw_latents(work: Path, family: PixArt | Flux, count: int, seed: int, batch: int = 8) -> None:
    """Generate scenes that are not held out with the trained pipeline, and save the latents and plain captions."""
    pipeline = load_pipeline(work, family)
    pipeline.set_progress_bar_config(disable=True)
    rng, latents, texts = np.random.default_rng((seed, count)), [], []
    while len(texts) < count:
        prompts = [caption(sample_scene(rng)) for _ in range(batch)]
        latents.append(family.sample(pipeline, prompts, torch.Generator().manual_seed(len(texts))).half())
        texts += prompts
    save_checkpoint(work / f"drawn-{family.name}.pt", latents=torch.cat(latents), captions=texts)


def export(work: Path, family: PixArt | Flux, folder: Path) -> None:
    """Write the averaged weights as a pipeline folder; they are stored in half and loaded in single precision."""
    pipeline = load_pipeline(work, family)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.half).save_pretrained(partial)
    # Diffusers' own models load in single precision, so the text encoders must, too. Transformers 4 does not know the
    # class name of tokenizers and the names of CLIP's weights that Transformers 5 writes.
    for part in partial.glob("text_encoder*"):
        edit_json(part / "config.json", dtype="float32")
    for part in partial.glob("tokenizer*"):
        edit_json(part / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        edit_json(partial / "model_index.json", **{part.name: ["transformers", "PreTrainedTokenizerFast"]})
    if isinstance(pipeline.text_encoder, CLIPTextModel):
        weights = {f"text_model.{name}": value for name, value in pipeline.text_encoder.state_dict().items()}
        save_file(weights, partial / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    for weights in partial.rglob("*.safetensors"):
        weights.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def edit_json(path: Path, **changes) -> None:
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("vae", "cache", "text", "start", "transformer", "draw", "decoder", "export"))
    parser.add_argument("--family", choices=list(FAMILIES), default="pixart", help="family of the transformer stages")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tiny_model"), help="folder of the checkpoints")
    parser.add_argument(
        "--steps", type=int, default=1600, help="total steps of the stage, including those before a resume"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--count", type=int, default=8192, help="images to cache or to generate")
    parser.add_argument(
        "--rates", type=float, nargs=3, default=(1e-3, 1e-3, 1e-3), help="learning rates: others, text, matrices"
    )
    parser.add_argument("--cooldown", type=int, default=0, help="final steps over which the rates fall to 0")
    parser.add_argument(
        "--shift", type=float, default=2.0, help="shift of the training noise levels towards high noise"
    )
    parser.add_argument("--bfloat16", action="store_true", help="compute the products of the blocks in bfloat16")
    parser.add_argument(
        "--folder", type=Path, default=Path("shapes-256"), help="pipeline folder to write or to start from"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "vae":
        train_vae(args.work, args.steps, args.seed)
    elif args.stage == "cache":
        cache_latents(args)
    elif args.stage == "text":
        train_text(args.work, args.steps, args.batch, args.seed)
    elif args.stage == "start":
        start(args.work, args.folder)
    elif args.stage == "transformer":
        train_transformer(args)
    elif args.stage == "draw":
        draw_latents(args.work, FAMILIES[args.family](), args.count, args.seed)
    elif args.stage == "decoder":
        train_decoder(args.work, args.steps, args.rates[0], args.seed)
    else:
        export(args.work, FAMILIES[args.family](), args.folder)


if __name__ == "__main__":
    main()
