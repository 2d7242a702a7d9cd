"""Guidance that reads the whole prediction, or changes between steps, equals serial; under PipeFusion, the oracle."""

import importlib
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import running
import tiny
import torch
import whole
from diffusers import ClassifierFreeGuidance

from xfuser.models.registry import plan_of
from xfuser.testing import oracle
from xfuser.testing.projections import bands, layout

STEPS = 7
EXACT = {"ulysses2": {"ulysses_degree": 2}, "cfg2": {"use_cfg_parallel": True}}
PARTS = {
    "pipefusion2": (2, {"pipefusion_parallel_degree": 2}),
    "pipefusion2 x ulysses2": (4, {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}),
    "pipefusion2 x cfg2": (4, {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}),
}
RUN = [((2, 1), parts) for parts in PARTS] + [((3, 2), parts) for parts in list(PARTS)[:2]]


def batched(pipe, scales):
    """Return a callback that switches between batched guidance and calls of one branch."""
    both = {}

    def callback(pipe, step, timestep, values):
        embeds = values["prompt_embeds"], values["pooled_prompt_embeds"]
        both.setdefault("embeds", embeds)
        if step in scales:
            pipe._guidance_scale = scales[step]
            embeds = both["embeds"] if scales[step] > 1 else [x.chunk(2)[1] for x in both["embeds"]]
        return values | {"prompt_embeds": embeds[0], "pooled_prompt_embeds": embeds[1]}

    return callback


def sequential(pipe, scales):
    """Return a callback that switches between two calls per step and one."""

    def callback(pipe, step, timestep, values):
        pipe._guidance_scale = scales.get(step, pipe._guidance_scale)
        return values

    return callback


NAMES = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
CASES = {  # pipeline, callback, scales set after some steps, guider, steps in which guidance begins or ends
    "sd3, ends": ("sd3", batched, {2: 1.0}, None, (3,)),
    "sd3, an interval": ("sd3", batched, {1: 1.0, 2: 4.0}, None, (2, 3)),
    "wan, scales": ("wan_i2v", sequential, {1: 3.0, 2: 2.5}, None, ()),
    "wan, an interval": ("wan_i2v", sequential, {1: 1.0, 2: 3.0}, None, (2, 3)),
    "hunyuan_video_15, ends": ("hunyuan_video_15", None, {}, {"guidance_scale": 2.0, "stop": 0.5}, (3,)),
    "hunyuan_video_15, begins": ("hunyuan_video_15", None, {}, {"guidance_scale": 2.0, "start": 0.4}, (2,)),
    "hunyuan_dit, rescaled": ("hunyuan_dit", None, {}, None, ()),
    "hunyuan_video_15, rescaled": ("hunyuan_video_15", None, {}, {"guidance_scale": 4.0, "guidance_rescale": 0.7}, ()),
    "z_image, normalized": ("z_image", None, {}, None, ()),
}


@contextmanager
def rescaling(pipe, module, patches, synchronous):
    """Within the context, a patch's statistics use the patches up to it of this step, and later ones of the last."""
    module, plan = importlib.import_module(module), plan_of(pipe.transformer)
    original, before, step = module.rescale_noise_cfg, [], 0

    def rescale(noise_cfg, noise_pred_text, guidance_rescale):
        nonlocal before, step
        fresh, step = (noise_cfg, noise_pred_text), step + 1
        result = original(*fresh, guidance_rescale)
        dim, unit, _ = layout(pipe.transformer, plan, noise_cfg)
        for band in bands(noise_cfg.shape[dim] // unit, patches) if step > synchronous else ():
            start, stop = band.start * unit, band.stop * unit
            old = [x.narrow(dim, stop, x.shape[dim] - stop) for x in before]
            mixed = [torch.cat([x.narrow(dim, 0, stop), y], dim) for x, y in zip(fresh, old, strict=True)]
            rows = original(*mixed, guidance_rescale).narrow(dim, start, stop - start)
            result.narrow(dim, start, stop - start).copy_(rows)
        before = fresh
        return result

    with mock.patch.object(module, "rescale_noise_cfg", rescale):
        yield


class Norms:
    """Norms of a prediction, one for each row of latents as its patch computes it; replaces a single number."""

    def __init__(self, of_rows):
        self.of_rows = of_rows

    def __mul__(self, number):
        return Norms(self.of_rows * number)

    def __gt__(self, largest):
        return True

    def __truediv__(self, norms):
        return (self.of_rows / norms.of_rows).clamp(max=1)


@contextmanager
def normalizing(pipe, patches, synchronous):
    """Within the context, a patch's norms use the patches up to it of this step, and later ones of the last."""
    original, plan, seen = torch.linalg.vector_norm, plan_of(pipe.transformer), []

    def norm(x):
        dim, unit, _ = layout(pipe.transformer, plan, x)
        seen.append(x)  # alternately the prediction with the prompt, and the combined one
        asynchronous = len(seen) > 2 * synchronous
        old, rows = seen[-3] if asynchronous else x, x.new_empty(x.shape[dim])
        for band in bands(len(rows) // unit, patches if asynchronous else 1):
            start, stop = band.start * unit, band.stop * unit
            rows[start:stop] = original(
                torch.cat([x.narrow(dim, 0, stop), old.narrow(dim, stop, len(rows) - stop)], dim)
            )
        return Norms(rows.view([-1 if i == dim else 1 for i in range(x.dim())]))

    with mock.patch.object(torch.linalg, "vector_norm", norm):
        yield


def draw(path, case, asked, defined=None):
    """Return the latents of a call under ``asked`` degrees, or of the oracle with ``defined`` patches and steps."""
    name, callback, scales, guider, starts = CASES[case]
    of_whole = name in whole.WHOLE
    pipe = whole.loaded(path, name) if of_whole else running.loaded(path, torch.float64)
    call = (whole if of_whole else tiny).call_of(name, num_inference_steps=STEPS, guidance_scale=4.0)
    call["output_type"] = "latent"
    if guider:
        del call["guidance_scale"]
        pipe.guider = ClassifierFreeGuidance(**guider)
    if callback:
        names = [one for one in NAMES if one in pipe._callback_tensor_inputs]
        call |= {"callback_on_step_end": callback(pipe, scales), "callback_on_step_end_tensor_inputs": names}
    if name == "hunyuan_dit":
        call["guidance_rescale"] = 0.7
    if name == "z_image":
        call["cfg_normalization"] = 0.9
    with ExitStack() as stack:
        if defined:
            stack.enter_context(oracle.displaced(pipe, *defined, starts=starts))
            if "rescaled" in case:
                module = ClassifierFreeGuidance.__module__ if guider else type(pipe).__module__
                stack.enter_context(rescaling(pipe, module, *defined))
            if "normalized" in case:
                stack.enter_context(normalizing(pipe, *defined))
        parallel = running.wrap(pipe, asked)
        result = running.array(parallel(**call, generator=running.seeded()))
        running.unwrap(parallel)
    return result


reference = running.remembered(draw)


@pytest.fixture(scope="session")
def path_of(tmp_path_factory, folder_of):
    root = tmp_path_factory.mktemp("guided")

    def path(case):
        name = CASES[case][0]
        return whole.save(name, root) if name in whole.WHOLE else folder_of(name, True)

    return path


def tolerance(case):
    name = CASES[case][0]
    return whole.WHOLE[name].tolerance if name in whole.WHOLE else running.TOLERANCE


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_guidance_equals_serial(pool, path_of, case, method):
    expected = reference(path_of(case), case, None)
    for result in pool.run(2, draw, path_of(case), case, EXACT[method]):
        assert running.error(result, expected) <= tolerance(case)


@pytest.mark.parametrize(("defined", "parts"), RUN)
@pytest.mark.parametrize("case", CASES)
def test_patches_with_guidance_equal_the_oracle(pool, path_of, case, defined, parts):
    expected, (ranks, degrees) = reference(path_of(case), case, None, defined), PARTS[parts]
    assert running.error(expected, reference(path_of(case), case, None)) > 10 * tolerance(case)  # stale
    asked = degrees | {"num_pipeline_patch": defined[0], "warmup_steps": defined[1]}
    for result in pool.run(ranks, draw, path_of(case), case, asked):
        assert running.error(result, expected) <= tolerance(case)
