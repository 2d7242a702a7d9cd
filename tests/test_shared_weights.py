"""Weights sharded over ranks, or held by one rank: images and embeddings equal those of whole pipelines."""

import types

import numpy as np
import pytest
import running
import tiny
import torch
from diffusers import DiffusionPipeline
from torch import nn

from xfuser import xDiTParallel, xFuserArgs
from xfuser.weights.loading import load_pipeline
from xfuser.weights.text_encoders import TextEncoders

ENCODERS = {"sd3": ("text_encoder", "text_encoder_2", "text_encoder_3"), "flux": ("text_encoder", "text_encoder_2")}


def held(pipe, names):
    """Return the bytes of these components' weights on this rank."""
    found = 0
    for name in names:
        for weight in getattr(pipe, name).parameters():
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            found += 0 if local.is_meta else local.nbytes
    return found


def state(pipe):
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {f"{type(part).__name__}.{name}": x.clone() for part in parts for name, x in part.state_dict().items()}


def draw(path, degrees, call, names, loads):
    """Return an image, the fraction of these components' bytes held, and whether unwrap() restores all weights."""
    engine_config, _ = xFuserArgs(model=path, dtype="float32", **degrees).create_config()
    before = state(running.loaded(path))
    total = held(running.loaded(path), names)
    pipe = load_pipeline(engine_config) if loads else running.loaded(path)
    pipe.set_progress_bar_config(disable=True)
    parallel = xDiTParallel(pipe, engine_config)
    share = held(parallel, names) / total
    picture = running.array(parallel(**call, generator=running.seeded()))
    again = running.array(parallel(**call, generator=running.seeded()))
    bare = parallel.unwrap()
    after = state(bare)
    whole_again = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert np.array_equal(picture, again)
    alone = running.array(bare(**call, generator=running.seeded()))
    return picture, share, whole_again, running.error(alone, picture)


LESS = {"replicate": 1.0, "shard": 0.8, "rank0": 0.0, "offload": 0.0}


@pytest.mark.parametrize("loads", [False, True], ids=["wrapped", "loaded"])
@pytest.mark.parametrize("mode", ["shard", "rank0", "offload"])
@pytest.mark.parametrize(("family", "degrees"), [("sd3", {"data_parallel_degree": 2}), ("flux", {"ulysses_degree": 2})])
def test_text_encoders_tell_the_same_wherever_they_are(pool, folder_of, family, degrees, mode, loads):
    path, call = folder_of(family), tiny.call_of(family, 3)
    expected = running.bare(path, call)
    told = pool.run(2, draw, path, degrees | {"text_encoder": mode}, call, ENCODERS[family], loads)
    for rank, (picture, share, whole_again, change) in enumerate(told):
        assert running.error(picture, expected) <= running.TOLERANCE and change <= running.TOLERANCE
        assert share <= (1.0 if mode == "rank0" and rank == 0 else LESS[mode]) and whole_again


def embeddings(path, mode, prompts):
    pipe = xDiTParallel(running.loaded(path), *xFuserArgs(use_cfg_parallel=True, text_encoder=mode).create_config())
    with torch.no_grad():
        told = pipe.encode_prompt(prompts, prompts, prompts, negative_prompt=["the cat"] * 3)
    assert {(one.device.type, one.dtype) for one in pipe.text_encoder.parameters()} == {("cpu", torch.float32)}
    assert pipe.text_encoder.config.vocab_size == len(tiny.WORDS) and pipe.text_encoder.dtype == torch.float32
    pipe.unwrap()
    return [x.numpy() for x in told]


def test_embeddings_are_the_same(pool, folder_of):
    """Compare three encoders, for three prompts and their negative prompts."""
    path, prompts = folder_of("sd3"), [tiny.PROMPT, "the cat", "a green square"]
    expected = pool.run(2, embeddings, path, "replicate", prompts)[0]
    for mode in ("shard", "rank0", "offload"):
        for told in pool.run(2, embeddings, path, mode, prompts):
            assert all(np.array_equal(x, y) for x, y in zip(told, expected, strict=True))


def test_buffers_of_an_offloaded_encoder_are_on_the_device(monkeypatch):
    """The device here is meta, to which weights cannot be moved: the encoder has buffers only."""
    monkeypatch.setattr("xfuser.weights.text_encoders.is_freed", lambda module: False)
    encoder, device = nn.Sequential(nn.BatchNorm1d(4, affine=False)), torch.device("meta")
    pipe = types.SimpleNamespace(components={"text_encoder": encoder})
    TextEncoders(pipe, "offload", types.SimpleNamespace(world_size=1, device=device)).place()
    assert {x.device for x in encoder.buffers()} == {device}


@pytest.mark.parametrize("loads", [False, True], ids=["wrapped", "loaded"])
@pytest.mark.parametrize(
    ("family", "ranks", "degrees"),
    [
        ("sd3", 4, {"use_cfg_parallel": True, "ulysses_degree": 2}),
        ("hunyuan_dit", 2, {"ring_degree": 2}),  # the forward also uses submodules of blocks
    ],
)
def test_a_transformer_in_shares(pool, folder_of, family, ranks, degrees, loads):
    path, call = folder_of(family), tiny.call_of(family, 3)
    told = pool.run(ranks, draw, path, degrees | {"fully_shard_degree": ranks}, call, ("transformer",), loads)
    for picture, share, whole_again, change in told:
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE and whole_again
        assert share < 1 and change <= running.TOLERANCE


def after_a_bare_call(path, call):
    """Shard a model after an unwrapped call, which leaves hook registries on it; return an image."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    expected = running.array(pipe(**call, generator=running.seeded()))
    assert hasattr(pipe.transformer, "_diffusers_hook")
    parallel = running.wrap(pipe, {"ulysses_degree": 2, "fully_shard_degree": 2})
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return running.error(picture, expected), running.error(
        running.array(pipe(**call, generator=running.seeded())), expected
    )


def test_shares_of_a_model_that_was_called_before(pool, folder_of):
    for errors in pool.run(2, after_a_bare_call, folder_of("flux"), tiny.call_of("flux")):
        assert max(errors) <= running.TOLERANCE


def all_equal_one_rank(pool, path, action):
    """Every image that ``action(path, call)`` returns on two ranks equals that of one rank."""
    call = tiny.call_of("sd3")
    expected = running.bare(path, call)
    for pictures in pool.run(2, action, path, call):
        assert all(running.error(picture, expected) <= running.TOLERANCE for picture in pictures)


def wrapped_one_after_the_other(path, call):
    pipe = running.loaded(path)
    pictures = []
    for degrees in ({"ring_degree": 2}, {"ulysses_degree": 2, "fully_shard_degree": 2}):
        parallel = running.wrap(pipe, degrees)
        pictures.append(running.array(parallel(**call, generator=running.seeded())))
        parallel.unwrap()
    return pictures


def test_shares_behind_other_groups(pool, folder_of):
    """Weights are gathered over the current groups, not over earlier equal ones."""
    all_equal_one_rank(pool, folder_of("sd3"), wrapped_one_after_the_other)


def in_inference_mode_first(path, call):
    pipe = running.loaded(path)
    parallel = running.wrap(pipe, {"ulysses_degree": 2, "fully_shard_degree": 2, "text_encoder": "shard"})
    with torch.inference_mode():
        pictures = [running.array(parallel(**call, generator=running.seeded()))]
    pictures.append(running.array(parallel(**call, generator=running.seeded())))
    parallel.unwrap()
    return pictures


def test_shares_in_and_outside_of_inference_mode(pool, folder_of):
    all_equal_one_rank(pool, folder_of("sd3"), in_inference_mode_first)


def saved(path, degrees, call, folder):
    """Return errors of images after save_pretrained() and of what it saved, refusals, and whether weights match."""
    pipe, messages = running.loaded(path), []
    before, expected = state(pipe), running.array(pipe(**call, generator=running.seeded()))
    parallel = running.wrap(pipe, degrees)
    names = [name for name in ("transformer", *ENCODERS["sd3"]) if "save_pretrained" in vars(getattr(parallel, name))]
    for name in names:
        for save in (getattr(parallel, name).save_pretrained, pipe.save_pretrained):
            with pytest.raises(ValueError) as error:
                save(f"{folder}/part")
            messages.append(str(error.value))
    parallel.save_pretrained(folder)
    pictures = [running.array(parallel(**call, generator=running.seeded()))]
    bare = parallel.unwrap()
    assert not any("save_pretrained" in vars(getattr(bare, name)) for name in ("transformer", *ENCODERS["sd3"]))
    written = running.loaded(folder)
    pictures.append(running.array(written(**call, generator=running.seeded())))
    found = state(written)
    whole = before.keys() == found.keys() and all(torch.equal(before[name], found[name]) for name in before)
    return [running.error(picture, expected) for picture in pictures], names, messages, whole


PARTS = {
    "pipefusion": {"pipefusion_parallel_degree": 2, "warmup_steps": 3},
    "tensor": {"tensor_parallel_degree": 2},
    "fully_shard": {"fully_shard_degree": 2, "ulysses_degree": 2},
    **{mode: {"ulysses_degree": 2, "text_encoder": mode} for mode in ("shard", "rank0", "offload")},
}


@pytest.mark.parametrize("place", PARTS)
def test_save_pretrained_writes_whole_weights(pool, folder_of, tmp_path, place):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    for errors, names, messages, whole in pool.run(2, saved, path, PARTS[place], call, str(tmp_path / "saved")):
        assert max(errors) <= running.TOLERANCE and whole
        assert names == (list(ENCODERS["sd3"]) if place in ("shard", "rank0", "offload") else ["transformer"])
        assert all("this rank has a part of the weights" in message for message in messages)


def fails_to_save(path, folder):
    parallel = running.wrap(running.loaded(path), PARTS["pipefusion"])
    with pytest.raises((RuntimeError, OSError)) as error:
        parallel.save_pretrained(folder)
    picture = running.array(parallel(**tiny.call_of("sd3"), generator=running.seeded()))
    parallel.unwrap()
    return type(error.value), picture


def test_all_ranks_hear_of_a_failure_to_save_and_go_on(pool, folder_of, tmp_path):
    (tmp_path / "file").write_text("")
    expected = running.bare(folder_of("sd3"), tiny.call_of("sd3"))
    told = pool.run(2, fails_to_save, folder_of("sd3"), str(tmp_path / "file" / "saved"))
    assert issubclass(told[0][0], OSError) and told[1][0] is RuntimeError
    assert all(running.error(picture, expected) <= running.TOLERANCE for _, picture in told)
