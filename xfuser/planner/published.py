"""Published pipelines by name, with all that is needed to rehearse them without a download.

For each pipeline, ``published.json`` has the classes of its components, their configurations where these differ from
the classes' defaults (as in the models' own repositories), the shapes of the prompt embeddings, and the usual call.
"""

import inspect
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from xfuser.config import InputConfig
from xfuser.models.registry import check_folder
from xfuser.weights.skeleton import skeleton
from xfuser.weights.text_encoders import PREFIX

SETTINGS = {"requires_safety_checker": False, "is_distilled": True}  # passed to pipelines that accept them
FILE = Path(__file__).with_name("published.json")
NOT_MODULES = ("pipeline", "scheduler", "embeds", "call", "guided", "config", "wide", "tiled", "lists", "as")


@cache
def published() -> dict[str, dict[str, Any]]:
    """All published pipelines; an entry with ``as`` inherits the components of the entry named there."""
    with open(FILE, encoding="utf-8") as file:
        found = json.load(file)
    return {name: found.get(entry.get("as"), {}) | entry for name, entry in found.items()}


def named(model: str | None) -> str | None:
    """The published name for a model name, with or without its owner on the hub; None if it is not published."""
    name = (model or "").rpartition("/")[2].lower()
    candidates = (name, name.removesuffix("-diffusers"), name.removesuffix("-hf"))
    return next((one for one in candidates if one in published()), None)


def parts_of(name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules of a published pipeline, without weights."""
    entry, parts = published()[name], {}
    for part in (part for part in entry if part not in NOT_MODULES):
        parts[part] = module_of(name, part, torch.float32 if part in entry.get("wide", ()) else dtype)
    return parts


def module_of(name: str, part: str, dtype: torch.dtype) -> nn.Module:
    """A new instance of one module of a published pipeline, without weights."""
    kind, config = published()[name][part][:2]
    return _module(part, kind, config, dtype)


def _module(part: str, kind: str, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    if not part.startswith(PREFIX):
        return skeleton(lambda: getattr(diffusers, kind).from_config(config), dtype)
    cls = getattr(transformers, kind)
    module = skeleton(lambda: cls(cls.config_class(**config)), dtype)
    module.tie_weights()
    return module


def pipeline_of(name: str, parts: dict[str, nn.Module]) -> Any:
    """Build the pipeline from these parts, without the text encoders, as the call passes embeddings."""
    entry = published()[name]
    cls, (kind, config) = getattr(diffusers, entry["pipeline"]), entry["scheduler"]
    given = {part: module for part, module in parts.items() if not part.startswith(PREFIX)}
    given |= {"scheduler": getattr(diffusers, kind).from_config(config)} | entry.get("config", {})
    takes = inspect.signature(cls.__init__).parameters
    given |= {part: value for part, value in SETTINGS.items() if part in takes}
    lacking = [part for part, spec in takes.items() if spec.default is spec.empty and part not in ("self", *given)]
    given |= dict.fromkeys(lacking)
    pipe = cls(**given)
    if entry.get("tiled"):
        pipe.vae.enable_tiling()
    return pipe


def texts_of(name: str, inputs: InputConfig) -> list[tuple[str, torch.Tensor]]:
    """Inputs of a published pipeline's text encoders, ``[batch, tokens]``: prompts, and with guidance negative ones."""
    entry, batch = published()[name], inputs.batch_size
    tokens = {
        part: torch.zeros(batch, value[2], dtype=torch.long) for part, value in entry.items() if part.startswith(PREFIX)
    }
    return list(tokens.items()) * (1 + guided(name, inputs))


def guided(name: str, inputs: InputConfig) -> bool:
    """Whether classifier-free guidance runs: by default for this model, or because of a negative prompt."""
    return inputs.do_classifier_free_guidance and (published()[name]["guided"] or any(inputs.negative_prompt))


def check_guidance(name: str, inputs: InputConfig) -> None:
    """Raise a ValueError for CFG parallelism without guidance."""
    if inputs.use_cfg_parallel and not guided(name, inputs):
        raise ValueError(
            f"use_cfg_parallel: {name} runs without classifier-free guidance; give a negative prompt"
            " (--negative_prompt), or use the ranks for another method"
        )


def sized(name: str, inputs: InputConfig) -> dict[str, int]:
    """Height, width, and frames: as requested, else as in the usual call."""
    usual = published()[name]["call"]
    asked = {key: getattr(inputs, key) for key in ("height", "width", "num_frames")}
    return {key: asked[key] or usual[key] for key in usual if key != "steps"}


def call_of(name: str, pipe: Any, inputs: InputConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a call of ``pipe``, with embeddings instead of prompts."""
    entry, guides = published()[name], guided(name, inputs)
    batch, call = inputs.batch_size, sized(name, inputs) | {"num_inference_steps": inputs.num_inference_steps}
    for key, shape in entry["embeds"].items():
        mask = "mask" in key
        value = torch.ones(batch, *shape, dtype=torch.long) if mask else torch.zeros(batch, *shape, dtype=dtype)
        value = list(value) if entry.get("lists") else value
        call |= {key: value} | ({f"negative_{key}": value} if guides else {})
    scale = "true_cfg_scale" if entry["pipeline"] == "QwenImagePipeline" else "guidance_scale"
    call[scale] = 5.0 if guides else 0.0 if entry.get("lists") else 1.0
    takes = inspect.signature(type(pipe).__call__).parameters
    call |= {key: None for key in ("prompt", "negative_prompt") if key in takes}
    return call | {"output_type": "pt"}


def configs_of(model: str, cache: str | None = None) -> str:
    """Return the folder of a pipeline; for one on the hub, download everything except the weights.

    Raises:
        ValueError: the folder is not a pipeline, or the hub does not have it or cannot be reached.
    """
    check_folder(model)
    if os.path.isdir(model):
        return model
    try:
        return snapshot_download(model, cache_dir=cache, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"])
    except OSError as error:
        raise ValueError(
            f"model={model!r} is neither a folder nor a pipeline on the hub"
            f" ({str(error).splitlines()[0]}): give one, or a published pipeline by name: {', '.join(published())}"
        ) from None
