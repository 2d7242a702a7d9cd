"""The tutorials run as printed, plans are checked, and modules outside of pipelines run in parallel."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import running
import tiny
import torch

import xfuser
from xfuser.core.distributed import get_runtime_state, get_world_group
from xfuser.models.plan import ModelPlan
from xfuser.parallel import Loop
from xfuser.testing.ranks import RankPool
from xfuser.testing.zoo import FAMILIES

GUIDE = Path(__file__).parent.parent / "docs" / "adding_models"
PIPED = ["--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "2"]


def script(name, arguments):
    sys.path.insert(0, str(GUIDE))
    sys.argv = [name, *arguments]
    runpy.run_path(str(GUIDE / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "ranks", "arguments"),
    [
        ("cfg_parallel.py", 2, []),
        ("usp.py", 3, ["--ring_degree", "3"]),
        ("usp.py", 4, ["--ulysses_degree", "2", "--ring_degree", "2"]),
        ("usp_replicated_text.py", 2, []),
        ("usp_replicated_text.py", 4, []),
        ("cfg_usp.py", 2, []),
        ("cfg_usp.py", 4, []),
        ("pipefusion.py", 4, [*PIPED, "--ulysses_degree", "2"]),
        ("pipefusion.py", 4, [*PIPED, "--use_cfg_parallel"]),
    ],
)
def test_tutorials(pool, name, ranks, arguments):
    pool.run(ranks, script, name, arguments)


def test_a_tutorial_as_printed():
    command = ["torchrun", "--nproc_per_node", "2", "cfg_parallel.py"]
    done = subprocess.run(command, cwd=GUIDE, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "relative error against one rank" in done.stdout, done.stderr


def test_pages_show_what_the_scripts_say():
    for page in GUIDE.glob("[1-5]_*.md"):
        text = page.read_text()
        name = text.split("The whole script: [")[1].split("]")[0]
        assert (GUIDE / name).exists()


@pytest.fixture
def kept_pool(monkeypatch):
    """One pool for all checks of a test, as starting a pool takes seconds."""
    pool = RankPool(2)
    monkeypatch.setattr(pool, "close", lambda: None)
    monkeypatch.setattr("xfuser.testing.check.RankPool", lambda world: pool)
    yield pool
    RankPool.close(pool)


def test_check_plan_names_the_first_module_that_differs(kept_pool):
    family = FAMILIES["wan"]
    model = family.build()
    draw = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, *family.latents, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=draw),
        "return_dict": False,
    }
    assert xfuser.check_plan(model, inputs).fits
    plan = xfuser.models.registry.plan_of(model)
    found = xfuser.check_plan(model, inputs, plan=ModelPlan(**{**vars(plan), "attention": {}}))
    assert not found.fits and found.first.startswith("blocks.0.attn1"), found
    with pytest.raises(ValueError, match=r"failed: ValueError: a per-token .* has 45 entries along dimension 1"):
        table = {"rotary_emb": xfuser.models.plan.Tokens(("image", "image"))}
        xfuser.check_plan(model, inputs, plan=ModelPlan(**{**vars(plan), "per_token": table}))


def loaded(path, name, degrees):
    args = xfuser.xFuserArgs(
        model=path, prompt=tiny.PROMPT, height=80, width=48, no_use_resolution_binning=True, **degrees
    )
    engine_config, input_config = args.create_config()
    pipe = getattr(xfuser, name).from_pretrained(path, engine_config=engine_config, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if "pixart" in path:
        pipe.prepare_run(input_config, steps=1)
    picture = running.array(pipe.to("cpu")(**tiny.call_of(Path(path).name), generator=running.seeded()))
    assert pipe.is_dp_last_group() == get_world_group().is_last_rank  # which rank of a script saves
    assert get_runtime_state().parallel_config is engine_config.parallel_config
    get_runtime_state().destory_distributed_env()
    return picture


@pytest.mark.parametrize(
    ("family", "name"), [("pixart_alpha", "xFuserPixArtAlphaPipeline"), ("flux", "xFuserFluxPipeline")]
)
def test_pipelines_are_loaded_and_wrapped_in_one_call(pool, folder_of, family, name):
    path = folder_of(family)
    expected = running.bare(path, tiny.call_of(family))
    for picture in pool.run(2, loaded, path, name, {"ring_degree": 2}):
        assert running.error(picture, expected) <= running.TOLERANCE


def test_pipeline_classes():
    names = "CogVideoX ConsisID Flux HunyuanDiT Latte PixArtAlpha PixArtSigma Sana StableDiffusion3 StableDiffusionXL"
    for name in names.split():
        assert getattr(xfuser, f"xFuser{name}Pipeline").pipeline_class.__name__ == f"{name}Pipeline"
    with pytest.raises(AttributeError):
        _ = xfuser.xFuserNothingPipeline


def test_pipefusion_of_a_bare_module_needs_its_scheduler():
    engine_config, _ = xfuser.xFuserArgs(pipefusion_parallel_degree=1, num_pipeline_patch=2).checked()
    with pytest.raises(ValueError, match="give parallelize\\(\\) the scheduler"):
        xfuser.parallelize(FAMILIES["wan"].build(), None, engine_config)


def test_what_is_no_configuration_or_plan_is_refused():
    configs = xfuser.xFuserArgs().checked()
    model = FAMILIES["wan"].build()
    loads = xfuser.xFuserPixArtAlphaPipeline.from_pretrained
    for config in (xfuser.xFuserArgs(), configs, configs[1], None):
        for call in (
            lambda config: xfuser.xDiTParallel(Loop(model, None), config),
            lambda config: xfuser.parallelize(model, None, config),
            xfuser.load_pipeline,
            lambda config: loads("/nowhere", engine_config=config),
        ):
            with pytest.raises(ValueError, match=f"of the type {type(config).__name__}, and must be the first result"):
                call(config)
    with pytest.raises(ValueError, match="plan='wan' must be a ModelPlan"):
        xfuser.parallelize(model, "wan", configs[0])
