"""Tiny pipelines of transformers with IP-adapters, loaded as users load them, and the functions that ranks run."""

from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import running
import tiny
import torch
import whole
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

EMBEDDING = 10  # channels of an embedded image
Weights = dict[str, dict[str, torch.Tensor]]


def of_flux(transformer: Any, seed: int) -> Weights:
    """Return weights of an adapter with four tokens per image."""
    generator, text = torch.Generator().manual_seed(seed), transformer.config.joint_attention_dim

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    projections = [f"{i}.to_{kind}_ip" for i in range(len(transformer.transformer_blocks)) for kind in "kv"]
    return {
        "image_proj": {
            "proj.weight": weights(4 * text, EMBEDDING), "proj.bias": weights(4 * text), "norm.weight": weights(text),
            "norm.bias": weights(text),
        },
        "ip_adapter": {f"{name}.weight": weights(transformer.inner_dim, text) for name in projections}
        | {f"{name}.bias": weights(transformer.inner_dim) for name in projections},
    }  # fmt: skip


def of_sd3(transformer: Any, seed: int) -> Weights:
    """Return weights of an adapter with three tokens per image, different in each step."""
    torch.manual_seed(seed)
    width, head_dim = transformer.inner_dim, transformer.config.attention_head_dim
    projection = IPAdapterTimeImageProjection(EMBEDDING, width, 64, heads=1, num_queries=3, timestep_in_dim=8)
    count = transformer.config.num_layers + len(transformer.config.dual_attention_layers)
    processors = [SD3IPAdapterJointAttnProcessor2_0(width, width, head_dim, timesteps_emb_dim=64) for _ in range(count)]
    adapter = {f"{i}.{key}": 2 * x for i, one in enumerate(processors) for key, x in one.state_dict().items()}
    return {"image_proj": projection.state_dict(), "ip_adapter": adapter}


WEIGHTS = {"flux": of_flux, "chroma": of_flux, "sd3": of_sd3}


def load(pipe: Any, family: str, adapters: int) -> None:
    weights = [WEIGHTS[family](pipe.transformer, seed) for seed in range(adapters)]
    if family == "sd3":
        pipe.load_ip_adapter(weights[0], weight_name="", image_encoder_folder=None)
    else:
        more = {"image_encoder_pretrained_model_name_or_path": None, "subfolder": [""] * adapters}
        pipe.load_ip_adapter(weights, weight_name=[""] * adapters, **more)


@cache
def loaded(path: str, family: str, adapters: int) -> Any:
    """Return a separate pipeline with this number of adapters."""
    pipe = whole.loaded.__wrapped__(path, family) if family in whole.WHOLE else running.loaded.__wrapped__(path)
    if adapters:
        load(pipe, family, adapters)
    return pipe


def pictures(adapters: int, seed: int) -> list[torch.Tensor]:
    """Return two images for the first adapter, and one for each of the others."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2 - min(i, 1), EMBEDDING, generator=generator) for i in range(adapters)]


def call_of(family: str, adapters: int, images: int, **changes: Any) -> dict[str, Any]:
    if family == "sd3":
        both = torch.cat([*pictures(1, 0), *pictures(1, 1)])
        return tiny.call_of("sd3", images, ip_adapter_image_embeds=both, **changes)
    call = whole.call_of("chroma") if family == "chroma" else tiny.call_of("flux", images)
    without = {"negative_prompt": "", "true_cfg_scale": 3.0} if family == "flux" else {"guidance_scale": 3.0}
    for seed, sign in enumerate(("", "negative_")):
        call[f"{sign}ip_adapter_image_embeds"] = pictures(adapters, seed)
    return call | without | changes


def draw(
    path: str, family: str, degrees: Any, adapters: int = 1, scale: Any = 1.0, images: int = 1, **changes: Any
) -> np.ndarray:
    """Run the pipeline wrapped with these degrees, or unwrapped within the context that a function returns."""
    pipe = loaded(path, family, adapters)
    called = pipe if callable(degrees) else running.wrap(pipe, degrees)
    called.set_ip_adapter_scale(scale)
    with degrees(pipe) if callable(degrees) else nullcontext():
        result = running.array(called(**call_of(family, adapters, images, **changes), generator=running.seeded()))
    running.unwrap(called)
    return result


def draw_late(path: str, family: str, degrees: Any, scale: Any, **changes: Any) -> list[np.ndarray]:
    """Load an adapter into the wrapped pipeline; return its result, and that of the unwrapped pipeline."""
    pipe = loaded.__wrapped__(path, family, 0)
    called = running.wrap(pipe, degrees)
    load(called, family, 1)
    called.set_ip_adapter_scale(scale)
    call = call_of(family, 1, 1, **changes)
    return [running.array(one()(**call, generator=running.seeded())) for one in (lambda: called, called.unwrap)]
