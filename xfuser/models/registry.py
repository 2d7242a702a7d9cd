"""Which plan serves which transformer class."""

import inspect
import json
import os

from torch import nn

from xfuser.models.dit import DIT
from xfuser.models.flux import FLUX
from xfuser.models.hunyuandit import HUNYUAN_DIT
from xfuser.models.pixart import PIXART
from xfuser.models.plan import ModelPlan
from xfuser.models.sd3 import SD3

PLANS: dict[str, ModelPlan] = {
    "DiTTransformer2DModel": DIT,
    "FluxTransformer2DModel": FLUX,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
}


def plan_of(module: nn.Module) -> ModelPlan | None:
    """The plan of a module's class or of the nearest class that it derives from; None for other modules."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return next((PLANS[name] for name in names if name in PLANS), None)


def planned_models(pipe) -> dict[str, tuple[nn.Module, ModelPlan]]:
    """The pipeline's denoisers by component name, with their plans.

    Raises:
        ValueError: the pipeline has none that is known.
    """
    if not hasattr(pipe, "components"):
        raise ValueError(f"{type(pipe).__name__} is no Diffusers pipeline")
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found = {name: (part, plan) for name, part in modules.items() if (plan := plan_of(part))}
    if found:
        return found
    denoisers = [type(modules[name]).__name__ for name in ("transformer", "unet", "prior") if name in modules]
    raise _no_plan(type(pipe).__name__, denoisers)


def check_folder(path: str) -> None:
    """Raise a ValueError, without loading weights, for a folder that is no pipeline or has no known transformer.

    Names on the hub pass; they are checked once they are loaded.
    """
    if not os.path.exists(path):
        if os.path.isabs(path) or path.startswith("."):
            raise ValueError(f"model={path!r} does not exist")
        return
    index = os.path.join(path, "model_index.json")
    if not os.path.isfile(index):
        raise ValueError(f"model={path!r} is no Diffusers pipeline: it has no model_index.json")
    with open(index, encoding="utf-8") as file:
        parts = json.load(file).values()
    names = [part[1] for part in parts if isinstance(part, list) and len(part) == 2 and part[1]]
    if not any(name in PLANS for name in names):
        _check_classes(path, names)


def _check_classes(path: str, names: list[str]) -> None:
    import diffusers  # takes seconds, and is seldom needed here

    classes = [cls for name in names if inspect.isclass(cls := getattr(diffusers, name, None))]
    denoisers = [cls for cls in classes if issubclass(cls, nn.Module) and not cls.__name__.startswith("Autoencoder")]
    if denoisers and not any(base.__name__ in PLANS for cls in denoisers for base in cls.__mro__):
        raise _no_plan(f"model={path!r}", [cls.__name__ for cls in denoisers])


def _no_plan(owner: str, denoisers: list[str]) -> ValueError:
    advice = " U-Nets are not supported." if any("UNet" in name for name in denoisers) else ""
    return ValueError(
        f"{owner}: there is no plan for {', '.join(denoisers) or 'a pipeline without a transformer'}.{advice} Known"
        f" classes: {', '.join(PLANS)}. docs/adding_a_model.md shows how to add one"
    )
