"""Convert the input configuration to the arguments of a pipeline's call."""

import inspect
import os
from dataclasses import fields
from typing import Any

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available, load_image

from xfuser.config import InputConfig

PLAIN = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length", "output_type")
PLAIN += ("use_resolution_binning",)


def pipeline_arguments(pipe: Any, inputs: InputConfig) -> dict[str, Any]:
    """Keyword arguments for ``pipe(...)``.

    Raises:
        ValueError: the pipeline does not take one of the given inputs, or a prompt is missing.
    """
    takes = getattr(getattr(pipe, "blocks", None), "input_names", None)  # modular pipelines
    takes = takes or inspect.signature(type(pipe).__call__).parameters
    given = {name: getattr(inputs, name) for name in PLAIN}
    if "video_length" in takes:
        given["video_length"] = given.pop("num_frames")
    given["image"] = load_image(os.fspath(inputs.img_file_path)) if inputs.img_file_path else None
    given |= _subject(pipe, inputs, takes) | _guidance(inputs, takes)
    arguments = {name: value for name, value in given.items() if name in takes and value is not None}
    defaults = {spec.name: spec.default for spec in fields(InputConfig)}
    for name, value in given.items():
        if name not in takes and value is not None and value != defaults.get(name):
            raise ValueError(f"{type(pipe).__name__} takes no {name} (given: {value!r}); remove it")
    if "clean_caption" in takes:  # the pipeline's own choice, without its warning
        arguments["clean_caption"] = is_bs4_available() and is_ftfy_available()
    arguments["generator"] = torch.Generator("cpu").manual_seed(inputs.seed)
    return arguments


def _subject(pipe: Any, inputs: InputConfig, takes: Any) -> dict[str, Any]:
    """Prompts, or class labels for class-conditional pipelines."""
    prompts, negative = (
        [text] if isinstance(text, str) else list(text) for text in (inputs.prompt, inputs.negative_prompt)
    )
    if not any(prompts):
        raise ValueError('there is nothing to draw: give a prompt (--prompt "...")')
    if "class_labels" not in takes or "prompt" in takes:
        negative = negative * len(prompts) if len(negative) == 1 else negative
        return {"prompt": prompts, "negative_prompt": negative if any(negative) else None}
    known = getattr(pipe, "labels", {})
    labels = [int(prompt) if prompt.isdigit() else known.get(prompt) for prompt in prompts]
    if None in labels:
        unknown = prompts[labels.index(None)]
        names = f", or a name such as {', '.join(sorted(known)[:5])}" if known else ""
        raise ValueError(
            f"{type(pipe).__name__} draws classes, and knows none called {unknown!r}: give a class number{names}"
        )
    return {"class_labels": labels}


def _guidance(inputs: InputConfig, takes: Any) -> dict[str, Any]:
    """Scales of classifier-free guidance; 1 switches it off.

    Where ``guidance_scale`` is an input of a distilled model, ``true_cfg_scale`` is the guidance scale, and guidance
    runs only with a negative prompt.
    """
    guided = inputs.do_classifier_free_guidance
    if "true_cfg_scale" not in takes:
        return {"guidance_scale": inputs.guidance_scale if guided else 1.0}
    negative = any(inputs.negative_prompt)
    if inputs.use_cfg_parallel and not negative:
        raise ValueError(
            "use_cfg_parallel: this pipeline runs classifier-free guidance only with a negative prompt; give one"
            " (--negative_prompt), or use the ranks for another method"
        )
    scale = inputs.guidance_scale if guided and negative else 1.0
    return {"guidance_scale": inputs.guidance_scale, "true_cfg_scale": scale}
