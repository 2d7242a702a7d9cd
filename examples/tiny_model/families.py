"""The model families to train: the parts of each, the conditions of its denoiser, and its pipeline."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline
from models import (
    POOLED_LENGTH,
    TEXT_LENGTH,
    build_joint_transformer,
    build_pooled_encoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
)
from torch import nn

LENGTHS = [32] * 40 + [64, 64, 64, 64, 128, 128, 512]  # lengths of padded text; training samples from them
LATENTS = {"num_inference_steps": 20, "guidance_scale": 3.5, "max_sequence_length": 32, "output_type": "latent"}


def tokenize(tokenizer, texts: list[str], length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, padded to `length` or to the longest text, and the attention mask, 0 for padding."""
    padding = ("max_length", length) if length else ("longest", TEXT_LENGTH)
    tokens = tokenizer(texts, truncation=True, padding=padding[0], max_length=padding[1], return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


class PixArt:
    """Cross-attention to a T5 encoder's states; padding is masked."""

    name = "transformer"

    def __init__(self):
        self.tokenizer = build_tokenizer()

    def build(self) -> nn.ModuleDict:
        """Build the parts to train."""
        return nn.ModuleDict({"encoder": build_text_encoder(len(self.tokenizer)), "transformer": build_transformer()})

    def predict(self, parts: nn.ModuleDict, noisy: torch.Tensor, level: torch.Tensor, texts: list[str]):
        """Predict clean latents from noisy ones, all `[batch, 4, height, width]`."""
        tokens, mask = tokenize(self.tokenizer, texts)
        states = parts["encoder"](input_ids=tokens, attention_mask=mask).last_hidden_state
        told = {"encoder_hidden_states": states, "encoder_attention_mask": mask, "timestep": (level * 1000).long()}
        return parts["transformer"](noisy, **told, return_dict=False)[0]

    def sample(self, pipeline: PixArtSigmaPipeline, prompts: list[str], generator: torch.Generator) -> torch.Tensor:
        """Return the latents that the pipeline generates, `[batch, 4, 32, 32]`."""
        return pipeline(prompts, generator=generator, **LATENTS).images

    def pipeline(self, parts: nn.ModuleDict, vae) -> PixArtSigmaPipeline:
        """Return the pipeline with these trained parts."""
        return PixArtSigmaPipeline(
            tokenizer=self.tokenizer,
            text_encoder=parts["encoder"],
            vae=vae,
            transformer=parts["transformer"],
            scheduler=build_scheduler(),
        )


class Flux:
    """Joint attention with a T5 encoder's states, padding not masked, and a pooled CLIP embedding; no guidance."""

    name = "joint"

    def __init__(self):
        self.tokenizer = build_tokenizer()

    def build(self) -> nn.ModuleDict:
        """Build the parts to train."""
        words = len(self.tokenizer)
        encoders = {"encoder": build_text_encoder(words), "pooled": build_pooled_encoder(words)}
        return nn.ModuleDict({**encoders, "transformer": build_joint_transformer()})

    def predict(self, parts: nn.ModuleDict, noisy, level, texts: list[str], guidance: torch.Tensor | None = None):
        """Predict clean latents from noisy ones, all `[batch, 4, height, width]`.

        `guidance` is the guidance scale of each batch entry, `[batch]`. The default is 1, which means no guidance.
        """
        length = LENGTHS[int(torch.randint(len(LENGTHS), ()))]
        states = parts["encoder"](input_ids=tokenize(self.tokenizer, texts, length)[0]).last_hidden_state
        summary = parts["pooled"](input_ids=tokenize(self.tokenizer, texts, POOLED_LENGTH)[0]).pooler_output
        batch, channels, height, width = noisy.shape
        tokens = noisy.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3)
        # Small images show the same scenes as large ones, so their positions are spread over the same grid.
        rows, columns = (((torch.arange(n // 2) + 0.5) * 32 / n - 0.5) for n in (height, width))
        places = torch.stack(torch.meshgrid(torch.zeros(1), rows, columns, indexing="ij"), -1).view(-1, 3)
        predicted = parts["transformer"](
            tokens.flatten(1, 2),
            encoder_hidden_states=states,
            pooled_projections=summary,
            timestep=level,
            guidance=torch.ones(batch) if guidance is None else guidance,
            img_ids=places,
            txt_ids=torch.zeros(length, 3),
            return_dict=False,
        )[0]
        predicted = predicted.view(batch, height // 2, width // 2, channels, 2, 2)
        return predicted.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)

    def sample(self, pipeline: FluxPipeline, prompts: list[str], generator: torch.Generator) -> torch.Tensor:
        """Return the latents that the pipeline generates, `[batch, 4, 32, 32]`."""
        packed = pipeline(prompts, height=256, width=256, generator=generator, **LATENTS).images
        return pipeline._unpack_latents(packed, 256, 256, pipeline.vae_scale_factor)

    def pipeline(self, parts: nn.ModuleDict, vae) -> FluxPipeline:
        """Return the pipeline with these trained parts."""
        vae.register_to_config(shift_factor=0.0)
        return FluxPipeline(
            scheduler=build_scheduler(dynamic=True),
            vae=vae,
            text_encoder=parts["pooled"],
            tokenizer=build_tokenizer(POOLED_LENGTH),
            text_encoder_2=parts["encoder"],
            tokenizer_2=self.tokenizer,
            transformer=parts["transformer"],
        )


class GuidedFlux(Flux):
    """`Flux` with guidance distillation: one forward gives what guidance gives in two (arXiv 2210.03142)."""

    name, teacher = "joint-guided", Flux.name

    def teach(self, parts: nn.ModuleDict, noisy, level, texts: list[str], guidance: torch.Tensor) -> torch.Tensor:
        """Return the clean latents that the teacher's parts predict with these guidance scales."""
        told, untold = (self.predict(parts, noisy, level, given) for given in (texts, [""] * len(texts)))
        return untold + guidance[:, None, None, None] * (told - untold)


FAMILIES = {"pixart": PixArt, "flux": Flux, "guided-flux": GuidedFlux}
