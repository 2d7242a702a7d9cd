"""Tiny pipelines with ControlNets that affect the result, and calls of them."""

from typing import Any

import diffusers
import numpy as np
import running
import tiny
import torch
import whole

from xfuser.testing import oracle

ABSENT = ("image_encoder", "feature_extractor")
KINDS = {  # family, pipeline, net, changes of its configuration, arguments of the call
    "flux": ("flux", "FluxControlNetPipeline", "FluxControlNetModel", {"num_layers": 2, "num_single_layers": 1}, {}),
    "flux_uneven": ("flux", "FluxControlNetPipeline", "FluxControlNetModel", {"num_layers": 1, "num_single_layers": 2},
                    {"true_cfg_scale": 2.0, "negative_prompt": "the cat", "control_guidance_end": 0.6,
                     "sigmas": np.linspace(1.0, 0.25, 4)}),
    "flux_union": ("flux", "FluxControlNetPipeline", "FluxControlNetModel",
                   {"num_layers": 1, "num_single_layers": 1, "num_mode": 3}, {"control_mode": [0, 2]}),
    "sd3": ("sd3", "StableDiffusion3ControlNetPipeline", "SD3ControlNetModel", {"num_layers": 2}, {}),
    "sd3_single": ("sd3", "StableDiffusion3ControlNetPipeline", "SD3ControlNetModel",
                   {"num_layers": 3, "joint_attention_dim": None, "use_pos_embed": False,
                    "force_zeros_for_pooled_projection": False}, {"control_guidance_start": 0.4}),
    "hunyuan_dit": ("hunyuan_dit", "HunyuanDiTControlNetPipeline", "HunyuanDiT2DControlNetModel",
                    {"transformer_num_layers": 4}, {}),
    "qwen_image": ("qwen_image", "QwenImageControlNetPipeline", "QwenImageControlNetModel", {"num_layers": 2}, {}),
}  # fmt: skip


def net_of(transformer: Any, name: str, changes: dict[str, Any]) -> Any:
    """Return a ControlNet with seeded nonzero weights, and attention that affects the result."""
    torch.manual_seed(1)
    cls = getattr(diffusers, name)
    net = cls.from_config(dict(transformer.config) | changes)
    for key, weight in net.named_parameters():
        if weight.dim() > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.2)
        if weight.dim() == 2 and key.rpartition(".")[0].rpartition(".")[2] in ("to_q", "to_k"):
            weight.data.mul_(6)
    return net


def pipeline(path: str, kind: str) -> Any:
    family, cls, net, changes, _ = KINDS[kind]
    pipe = whole.loaded(path, family) if family in whole.WHOLE else running.loaded(path)
    parts = {name: part for name, part in pipe.components.items() if name not in ABSENT}
    net = net_of(pipe.transformer, net, changes)
    if kind == "hunyuan_dit":
        parts |= {"feature_extractor": None, "requires_safety_checker": False}
    made = getattr(diffusers, cls)(**parts, controlnet=[net] if kind == "flux_union" else net)
    made.set_progress_bar_config(disable=True)
    return made


def call_of(kind: str) -> dict[str, Any]:
    family, *_, changes = KINDS[kind]
    pictures = [running.picture(), running.picture().flip(2)]
    call = {"control_image": pictures if kind == "flux_union" else pictures[0], "num_inference_steps": 4}
    if kind == "flux_union":
        call["controlnet_conditioning_scale"] = [0.7, 0.4]
    if family == "qwen_image":
        return whole.call_of(family, **call, **changes)
    return tiny.call_of(family, 2 if kind == "sd3" else 1, **call, **changes)


def drawn(path: str, kind: str, degrees: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return an image of the wrapped pipeline for each of some degrees."""
    return [draw(path, kind, asked) for asked in degrees]


def draw(path: str, kind: str, asked: dict[str, Any] | tuple[int, int] | None) -> np.ndarray:
    """Return an image of the wrapped pipeline, of the unwrapped one (None), or of the oracle (patches, warm-up)."""
    pipe, call = pipeline(path, kind), call_of(kind)
    if isinstance(asked, tuple):
        with oracle.displaced(pipe, *asked):
            return running.array(pipe(**call, generator=running.seeded()))
    parallel = running.wrap(pipe, asked)
    picture = running.array(parallel(**call, generator=running.seeded()))
    running.unwrap(parallel)
    return picture
