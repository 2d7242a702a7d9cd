"""The plans of transformer classes, and checks of pipelines against them."""

import inspect
import json
import os
from typing import Any

from torch import nn

from xfuser.models.allegro import ALLEGRO
from xfuser.models.auraflow import AURAFLOW
from xfuser.models.bria import BRIA_FIBO, BRIA_FIBO2
from xfuser.models.chroma import CHROMA
from xfuser.models.cogvideox import COGVIDEOX, CONSISID
from xfuser.models.cogview4 import COGVIEW3_PLUS, COGVIEW4
from xfuser.models.cosmos import COSMOS
from xfuser.models.dit import DIT
from xfuser.models.easyanimate import EASYANIMATE
from xfuser.models.ernie_image import ERNIE_IMAGE
from xfuser.models.flux import FLUX, FLUX_CONTROLNET, WITHOUT_CONTROL
from xfuser.models.flux2 import FLUX2
from xfuser.models.flux3 import FLUX3
from xfuser.models.glm_image import GLM_IMAGE
from xfuser.models.helios import HELIOS
from xfuser.models.hidream import HIDREAM
from xfuser.models.hunyuan_video import FRAMEPACK, HUNYUAN_IMAGE, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from xfuser.models.hunyuandit import HUNYUAN_DIT, HUNYUAN_DIT_CONTROLNET
from xfuser.models.ideogram4 import IDEOGRAM4
from xfuser.models.joyimage import JOYIMAGE_EDIT, JOYIMAGE_EDIT_PLUS
from xfuser.models.kandinsky5 import KANDINSKY5
from xfuser.models.kandinsky6 import KANDINSKY6, KANDINSKY6_SR
from xfuser.models.krea2 import KREA2
from xfuser.models.latte import LATTE
from xfuser.models.ltx import LTX2_VIDEO, LTX_VIDEO, SANA_WM_REFINER
from xfuser.models.lumina2 import LUMINA2
from xfuser.models.lumina_next import LUMINA_NEXT
from xfuser.models.minimax_h3 import MINIMAX_H3
from xfuser.models.mochi import MOCHI
from xfuser.models.motif_video import MOTIF_VIDEO
from xfuser.models.nucleus_moe import NUCLEUS_MOE
from xfuser.models.omnigen import OMNIGEN
from xfuser.models.pixart import PIXART
from xfuser.models.plan import ModelPlan
from xfuser.models.prx import PRX
from xfuser.models.qwen_image import QWEN_IMAGE, QWEN_IMAGE21, QWEN_IMAGE_CONTROLNET
from xfuser.models.sana import SANA, SANA_VIDEO, SANA_WM
from xfuser.models.sd3 import SD3, SD3_CONTROLNET
from xfuser.models.sound import ACE_STEP, LONGCAT_AUDIO, MINIMAX_MUSIC3, STABLE_AUDIO, STABLE_AUDIO3
from xfuser.models.teacache import teacache_plan
from xfuser.models.unet import MOTION_UNET, UNET, VIDEO_UNET
from xfuser.models.unserved import UNSERVED
from xfuser.models.wan import ANYFLOW, SKYREELS_V2, WAN, WAN_ANIMATE, WAN_VACE
from xfuser.models.z_image import Z_IMAGE

PLANS: dict[str, ModelPlan] = {
    "AceStepTransformer1DModel": ACE_STEP,
    "AllegroTransformer3DModel": ALLEGRO,
    "AnyFlowTransformer3DModel": ANYFLOW,
    "AuraFlowTransformer2DModel": AURAFLOW,
    "BriaFibo2Transformer2DModel": BRIA_FIBO2,
    "BriaFiboTransformer2DModel": BRIA_FIBO,
    "BriaTransformer2DModel": FLUX,
    "ChromaTransformer2DModel": CHROMA,
    "ChronoEditTransformer3DModel": WAN,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "CogView3PlusTransformer2DModel": COGVIEW3_PLUS,
    "CogView4Transformer2DModel": COGVIEW4,
    "ConsisIDTransformer3DModel": CONSISID,
    "CosmosTransformer3DModel": COSMOS,
    "DiTTransformer2DModel": DIT,
    "EasyAnimateTransformer3DModel": EASYANIMATE,
    "ErnieImageTransformer2DModel": ERNIE_IMAGE,
    "Flux2Transformer2DModel": FLUX2,
    "Flux3Transformer2DModel": FLUX3,
    "FluxTransformer2DModel": FLUX,
    "GlmImageTransformer2DModel": GLM_IMAGE,
    "HeliosTransformer3DModel": HELIOS,
    "HiDreamImageTransformer2DModel": HIDREAM,
    "HunyuanDiT2DModel": HUNYUAN_DIT,
    "HunyuanImageTransformer2DModel": HUNYUAN_IMAGE,
    "HunyuanVideo15Transformer3DModel": HUNYUAN_VIDEO_15,
    "HunyuanVideoFramepackTransformer3DModel": FRAMEPACK,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "I2VGenXLUNet": VIDEO_UNET,
    "Ideogram4Transformer2DModel": IDEOGRAM4,
    "JoyImageEditPlusTransformer3DModel": JOYIMAGE_EDIT_PLUS,
    "JoyImageEditTransformer3DModel": JOYIMAGE_EDIT,
    "Kandinsky5Transformer3DModel": KANDINSKY5,
    "Kandinsky6SRTransformer3DModel": KANDINSKY6_SR,
    "Kandinsky6Transformer3DModel": KANDINSKY6,
    "Krea2Transformer2DModel": KREA2,
    "LTX2VideoTransformer3DModel": LTX2_VIDEO,
    "LTXVideoTransformer3DModel": LTX_VIDEO,
    "LatteTransformer3DModel": LATTE,
    "LongCatAudioDiTTransformer": LONGCAT_AUDIO,
    "LongCatImageTransformer2DModel": WITHOUT_CONTROL,
    "Lumina2Transformer2DModel": LUMINA2,
    "LuminaNextDiT2DModel": LUMINA_NEXT,
    "MiniMaxH3Transformer3DModel": MINIMAX_H3,
    "MiniMaxMusic3Transformer1DModel": MINIMAX_MUSIC3,
    "MochiTransformer3DModel": MOCHI,
    "MotifVideoTransformer3DModel": MOTIF_VIDEO,
    "NucleusMoEImageTransformer2DModel": NUCLEUS_MOE,
    "OmniGenTransformer2DModel": OMNIGEN,
    "OvisImageTransformer2DModel": WITHOUT_CONTROL,
    "PRXTransformer2DModel": PRX,
    "PixArtTransformer2DModel": PIXART,
    "QwenImage21Transformer2DModel": QWEN_IMAGE21,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "SanaTransformer2DModel": SANA,
    "SanaVideoTransformer3DModel": SANA_VIDEO,
    "SanaWMLTX2RefinerTransformer3DModel": SANA_WM_REFINER,
    "SanaWMTransformer3DModel": SANA_WM,
    "SkyReelsV2Transformer3DModel": SKYREELS_V2,
    "StableAudio3DiTModel": STABLE_AUDIO3,
    "StableAudioDiTModel": STABLE_AUDIO,
    "UNet2DConditionModel": UNET,
    "UNet3DConditionModel": VIDEO_UNET,
    "UNetMotionModel": MOTION_UNET,
    "UNetSpatioTemporalConditionModel": VIDEO_UNET,
    "WanAnimateTransformer3DModel": WAN_ANIMATE,
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN_VACE,
    "ZImageTransformer2DModel": Z_IMAGE,
}

CONTROLNETS: dict[str, ModelPlan] = {  # of transformers; they return residuals, and have no head
    "FluxControlNetModel": FLUX_CONTROLNET,
    "HunyuanDiT2DControlNetModel": HUNYUAN_DIT_CONTROLNET,
    "QwenImageControlNetModel": QWEN_IMAGE_CONTROLNET,
    "SD3ControlNetModel": SD3_CONTROLNET,
}


INDEX = "model_index.json"  # in a pipeline's folder
UNCUT = "its weights cannot be divided over ranks: use Ulysses, ring, CFG or data parallelism"  # if quantised

_REGISTERED: dict[type, ModelPlan] = {}
_OWN = "_parallel_plan"  # attribute of a module that has its own plan


def register_plan(cls: type, plan: ModelPlan) -> None:
    """Use ``plan`` for a transformer class and classes that derive from it, in place of a built-in plan."""
    _REGISTERED[cls] = plan


def set_plan(module: nn.Module, plan: ModelPlan) -> None:
    """Use ``plan`` for this one module, in place of the plan of its class; raises a ValueError for what is no plan."""
    if not isinstance(plan, ModelPlan):
        raise ValueError(f"plan={plan!r} must be a ModelPlan, or None for a class that is registered with one")
    vars(original_of(module))[_OWN] = plan


def original_of(module: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``; other modules are returned as they are."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]
    return module


def plan_of(module: nn.Module) -> ModelPlan | None:
    """The plan of a module, of its class, or of the nearest base class; None for other modules.

    A transformer without a plan whose class has a context-parallel plan of Diffusers gets a plan based on that.
    """
    module = original_of(module)  # compiled modules pass attributes on, but have another class
    own = vars(module).get(_OWN) or _plan_of_class(type(module))
    context = getattr(module, "_cp_plan", None)
    return own if own or not context else _by_context(module, context)


def is_known(cls: type) -> bool:
    """Whether modules of this class have a plan, or a context-parallel plan of Diffusers."""
    return bool(_plan_of_class(cls) or getattr(cls, "_cp_plan", None))


def _plan_of_class(cls: type) -> ModelPlan | None:
    return next(filter(None, (_REGISTERED.get(base) or PLANS.get(base.__name__) for base in cls.__mro__)), None)


def _by_context(module: nn.Module, context: dict[str, Any]) -> ModelPlan:
    first = next(iter(inspect.signature(module.forward).parameters))
    split = {name: entry for name, entry in context.get("", {}).items() if isinstance(name, str)}
    unbatched = tuple(name for name, entry in split.items() if getattr(entry, "split_dim", 1) == 0)
    return ModelPlan(
        blocks=(), attention={}, latents=first, unbatched=unbatched, context=context,
        unpiped="there is no plan for it that names its blocks",
    )  # fmt: skip


def planned_models(pipe, piped: bool = False) -> dict[str, tuple[nn.Module, ModelPlan]]:
    """The pipeline's denoisers, by component name, and their plans; with ``piped``, the plans under PipeFusion.

    For compiled denoisers these are the original modules.

    Raises:
        ValueError: the pipeline has no transformer with a plan.
    """
    if not hasattr(pipe, "components"):
        raise ValueError(f"{type(pipe).__name__} is not a Diffusers pipeline")
    modules = {name: original_of(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found = {name: (part, plan.piped if piped else plan) for name, part in modules.items() if (plan := plan_of(part))}
    if found:
        return found
    denoisers = [type(modules[name]).__name__ for name in ("transformer", "unet", "prior") if name in modules]
    raise _no_plan(type(pipe).__name__, denoisers)


def controlnets_of(pipe: Any) -> list[tuple[nn.Module, ModelPlan]]:
    """A pipeline's ControlNets that have a plan, with their plans; one component may hold several."""
    parts = [original_of(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    nets = [net for part in parts for net in getattr(part, "nets", [part])]
    return [(net, CONTROLNETS[type(net).__name__]) for net in nets if type(net).__name__ in CONTROLNETS]


def check_methods(cls: str, plan: ModelPlan, sequence: bool, pipelined: bool, patched: bool = False) -> None:
    """Raise a ValueError if sequence parallelism, PipeFusion or DistriFusion is requested and does not support the
    class."""
    served = ["CFG", "data parallelism"]
    if plan.unsequenced is None:
        served.insert(0, "Ulysses, ring")
    if not plan.blocks and not plan.context:
        served += ["tensor parallelism"] + ["DistriFusion"] * plan.patched
    unpatched = plan.unpiped if plan.context else None if plan.patched else plan.unsequenced
    for asked, method, reason in (
        (sequence, "sequence parallelism (ulysses_degree, ring_degree)", plan.unsequenced),
        (pipelined, "PipeFusion", plan.unpiped),
        (patched, "DistriFusion (like naive patches)", unpatched),
    ):
        if asked and reason:
            raise ValueError(f"{method} does not support {cls}: {reason}. Use {', '.join(served[:-1])} or {served[-1]}")


def check_folder(
    path: str,
    sequence: bool = False,
    pipelined: bool = False,
    patched: bool = False,
    divides: bool = False,
    teacache: bool = False,
) -> None:
    """Raise a ValueError, without loading weights, for a folder that no requested method can run.

    Such a folder is not a pipeline, or has no known transformer, or one that a method does not support. With
    ``divides``, methods divide weights, which quantised weights do not support. Names on the Hub pass; they are checked
    once they are loaded.
    """
    if not os.path.exists(path):
        if os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1:
            raise ValueError(f"model={path!r} does not exist: give a folder, or a name on the hub, such as owner/name")
        return
    index = os.path.join(path, INDEX)
    if not os.path.isfile(index):
        raise ValueError(f"model={path!r} is not a Diffusers pipeline: it has no {INDEX}")
    if "_class_name" not in read_json(index):
        raise ValueError(f"{index} does not name the pipeline's class (_class_name): fetch it again")
    classes = {component: name for component, (_, name) in components_of(path).items()}
    for component, name in classes.items():
        if name in PLANS:
            check_methods(name, PLANS[name], sequence, pipelined, patched)
            if teacache:
                teacache_plan(name)
            if divides:
                _check_unquantised(os.path.join(path, component, "config.json"), name)
    if not any(name in PLANS for name in classes.values()):
        _check_classes(path, list(classes.values()))


def components_of(folder: str) -> dict[str, tuple[str, str]]:
    """The components in a pipeline's folder: library and class by name."""
    index = read_json(os.path.join(folder, INDEX))
    parts = {name: part for name, part in index.items() if not name.startswith("_")}  # others, such as _class_name
    return {name: tuple(part) for name, part in parts.items() if isinstance(part, list) and len(part) == 2 and part[1]}


def read_json(path: str, kind: type = dict) -> Any:
    """The object in a JSON file. One that cannot be read, or holds another kind, raises a ValueError with its path."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(found).__name__}")
    return found


def _check_unquantised(config: str, cls: str) -> None:
    if not os.path.isfile(config):
        return
    method = (read_json(config).get("quantization_config") or {}).get("quant_method")
    if method:
        raise ValueError(f"{config}: {cls} is quantised ({method}), and {UNCUT}")


def _check_classes(path: str, names: list[str]) -> None:
    import diffusers  # takes seconds, and is rarely needed here

    classes = [cls for name in names if inspect.isclass(cls := getattr(diffusers, name, None))]
    denoisers = [cls for cls in classes if issubclass(cls, nn.Module) and not cls.__name__.startswith("Autoencoder")]
    if denoisers and not any(map(is_known, denoisers)):
        raise _no_plan(f"model={path!r}", [cls.__name__ for cls in denoisers])


def _no_plan(owner: str, denoisers: list[str]) -> ValueError:
    if reasons := [f"{name}: {UNSERVED[name]}" for name in denoisers if name in UNSERVED]:
        return ValueError(f"{owner} is not supported. {'. '.join(reasons)}. docs/models.md lists what is")
    return ValueError(
        f"{owner}: there is no plan for {', '.join(denoisers) or 'a pipeline without a transformer'}. Known classes:"
        f" {', '.join(PLANS)}. docs/adding_models/README.md shows how to add one"
    )
