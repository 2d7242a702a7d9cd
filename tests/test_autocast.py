"""Under ``torch.autocast``, and when dtypes change between steps, methods equal one rank."""

import functools

import diffusers
import pytest
import torch

from xfuser import xDiTParallel, xFuserArgs
from xfuser.testing import matrix
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

ROUNDING = 3e-2  # rounding of bfloat16 over some blocks and steps
# Classes with larger bfloat16 errors on one rank (0.03 to 1), or whose expert routing changes with rounding.
ROUGH = {
    "nucleus_moe": 0.5,
    "helios": 0.1,
    "minimax_music3": 0.2,
    "stable_audio": 0.2,
    "unet_3d": 0.1,
    "unet_i2vgen": 0.1,
}
PRESENT = [name for name, family in FAMILIES.items() if family.present]
PIPED = [name for name in PRESENT if not matrix.refusal(name, "pipefusion")]
SEQUENCED = [name for name in PRESENT if not matrix.refusal(name, "ring")]
CALL = {"num_inference_steps": 3}


def errors(families, degrees):
    """Return the error of each family, and the dtypes of the results."""
    found = {}
    with torch.autocast("cpu", torch.bfloat16):
        for family in families:
            results, expected = matrix.draw(family, degrees, CALL), matrix.reference(family, degrees, CALL)
            assert [x.dtype for x in results] == [x.dtype for x in expected]
            found[family] = matrix.error([x.float() for x in results], expected)
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("families", "degrees"),
    [
        (SEQUENCED, {"ring_degree": 2}),  # with normalised queries and keys, values have a different dtype
        (SEQUENCED, {"ulysses_degree": 2}),
        (PRESENT, {"tensor_parallel_degree": 2}),
        (PIPED, matrix.PIPED | {"num_pipeline_patch": 3}),
    ],
    ids=["ring", "ulysses", "tensor", "pipefusion"],
)
def test_every_class_under_autocast(pool, families, degrees):
    for found in pool.run(2, errors, families, degrees):
        assert not {family: error for family, error in found.items() if error > ROUGH.get(family, ROUNDING)}


@pytest.mark.matrix
def test_pipefusion_with_ulysses_under_autocast(pool):
    degrees = matrix.PIPED | {"num_pipeline_patch": 2, "ulysses_degree": 2}
    for found in pool.run(4, errors, ["sd3", "pixart", "hunyuan_dit"], degrees):
        assert not {family: error for family, error in found.items() if error > ROUGH.get(family, ROUNDING)}


def in_half(family, scheduler, patches):
    """Denoise float32 latents with a bfloat16 transformer; compare patches, all in warm-up steps, with no patches."""

    def draw(degrees):
        pipe = loop_of(FAMILIES[family])
        pipe.scheduler = scheduler()
        forward = pipe.transformer.to(torch.bfloat16).forward

        @functools.wraps(forward)
        def cast(**arguments):
            return forward(**{name: _half(x) for name, x in arguments.items()})

        pipe.transformer.forward = cast
        if degrees is None:
            return pipe(FAMILIES[family], **CALL)
        return xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())(FAMILIES[family], **CALL)

    (latents, *_), (expected, *_) = draw({"num_pipeline_patch": patches, "warmup_steps": 3}), draw(None)
    assert latents.dtype == expected.dtype
    return torch.equal(latents, expected)


def _half(x):
    return x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_warm_up_is_exact_where_steps_change_the_dtype(pool, scheduler):
    """FlowMatchEuler returns latents in the dtype of the prediction."""
    for patches in (2, 3):
        assert pool.run(1, in_half, "flux", getattr(diffusers, scheduler), patches) == [True]
