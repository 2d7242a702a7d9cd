"""Every known transformer under every method equals serial; without ``--matrix``, only a covering set of cells runs."""

import inspect
from functools import partial

import diffusers
import pytest
import torch

from xfuser.methods import sequence
from xfuser.models.plan import blocks_of
from xfuser.models.registry import PLANS
from xfuser.models.unserved import UNSERVED
from xfuser.testing import matrix
from xfuser.testing.zoo import FAMILIES

COVERING = ("ulysses2", "pipefusion2 M=3")
PRESENT = [name for name, family in FAMILIES.items() if family.present]
CELLS = [(family, method) for family in PRESENT for method in matrix.METHODS]
RUN = [cell for cell in CELLS if not matrix.refusal(*cell)]
SHORT = [(family, COVERING[number % 2]) for number, family in enumerate(PRESENT)]  # one method per class
SHORT = [cell if cell in RUN else (cell[0], COVERING[0]) for cell in SHORT]


def test_every_class_is_there():
    assert {family.cls for family in FAMILIES.values()} == set(PLANS)
    assert not PLANS.keys() & UNSERVED.keys()


@pytest.mark.skipif(diffusers.__version__ != "0.42.1", reason="other releases have other classes")
def test_diffusers_has_no_transformer_without_plan_or_reason():
    assert matrix.unknown_classes() == []


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*cell, marks=pytest.mark.covering if cell in SHORT else pytest.mark.matrix) for cell in RUN],
)
def test_equals_serial(pool, family, method):
    assert matrix.cell(family, method, pool) <= matrix.TOLERANCES.get(family, matrix.TOLERANCE)


NAMED = ("math", "flash")  # attention backends with their own path to a kernel
ROWS = ({}, {"use_cfg_parallel": True}, {"data_parallel_degree": 2}, {"tensor_parallel_degree": 2})


def errors_by_backend(degrees):
    """Return the errors of all classes by name and backend, with methods whose ranks attend to all tokens."""
    call = {"num_inference_steps": 1}
    expected = {family: matrix.draw(family, None, call) for family in PRESENT}
    return {
        (family, name): matrix.error(matrix.draw(family, degrees | {"attention_backend": name}, call), whole)
        for family, whole in expected.items()
        for name in NAMED
    }


@pytest.mark.matrix
@pytest.mark.parametrize("degrees", ROWS, ids=["serial", "cfg2", "dp2", "tensor2"])
def test_named_backends_take_the_masks_of_all_classes(pool, degrees):
    for errors in pool.run(2 if degrees else 1, errors_by_backend, degrees):
        assert not {cell: e for cell, e in errors.items() if e > matrix.TOLERANCES.get(cell[0], matrix.TOLERANCE)}


def deaf(family, degrees, call):
    """A broken engine: every rank attends only to its own tokens."""
    whole, summed = sequence.usp_attention, sequence.SequenceParallel._sum
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    sequence.usp_attention = lambda q, k, v, *args, **kwargs: attend(q, k, v)
    sequence.SequenceParallel._sum = lambda self, state: state
    try:
        return matrix.draw(family, degrees, call)
    finally:
        sequence.usp_attention, sequence.SequenceParallel._sum = whole, summed


@pytest.mark.parametrize("family", [name for name in PRESENT if not matrix.refusal(name, "ulysses2")])
def test_attention_of_own_tokens_alone_would_be_noticed(pool, family):
    call = {"num_inference_steps": 2}
    expected = matrix.draw(family, None, call)
    for result in pool.run(2, deaf, family, {"ulysses_degree": 2}, call):
        assert matrix.error(result, expected) > 100 * matrix.TOLERANCE


@pytest.mark.parametrize("family", PRESENT)
def test_plan_names_what_is_there(family):
    model = FAMILIES[family].build()
    plan = PLANS[FAMILIES[family].cls]
    forward = set(inspect.signature(model.forward).parameters)
    assert {plan.latents, *plan.residuals, *plan.unbatched, *plan.batch_dims} <= forward
    for name in (plan.embed, plan.head):
        assert name is None or model.get_submodule(name) is not None
    arguments = set()
    for block in blocks_of(model, plan):
        own = set(inspect.signature(block.module.forward).parameters)
        assert set(plan.carriers(block.list_name)) <= own
        arguments |= own
    assert {*plan.per_token, *plan.leading, *filter(None, [plan.rows])} <= arguments
