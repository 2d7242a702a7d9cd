"""Models that are changed while they are wrapped: adapters (LoRA) and fused projections.

The wrapped model equals the changed model on one rank. unwrap() restores everything, or raises an error that says what
to do before it changes anything.
"""

from unittest import mock

import pytest
import running
import tiny
import torch

from xfuser.core.tensor_parallel import structure

FSDP = {"ulysses_degree": 2, "fully_shard_degree": 2}
TENSOR = {"tensor_parallel_degree": 2}
PIPED = {"pipefusion_parallel_degree": 2, "warmup_steps": 3}  # all steps are warm-up steps
everything = mock.patch.object(structure, "SMALLEST", 1)  # shard small layers as well


def adapter(pipe, rank=2, layers=("attn.to_q", "attn.to_v"), seed=3):
    """Return a LoRA for layers of a pipeline's transformer."""
    numbers, weights = torch.Generator().manual_seed(seed), {}
    for name, layer in pipe.transformer.named_modules():
        if name.endswith(layers) and name != "proj_out":
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=numbers)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=numbers)
    return weights


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())


CHANGES = {
    "lora": (lambda pipe, lora: pipe.load_lora_weights(lora), lambda pipe: pipe.unload_lora_weights()),
    "fused": (
        lambda pipe, lora: pipe.transformer.fuse_qkv_projections(),
        lambda pipe: pipe.transformer.unfuse_qkv_projections(),
    ),
}


def changed(path, degrees, call, change, only=None):
    """Return images of the changed and the restored model, unwrap()'s message, and whether all weights are restored."""
    pipe = running.fresh(path)
    lora, before = adapter(pipe), {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    do, undo = CHANGES[change]
    wrapped = running.wrap(pipe, degrees)
    alone = only is None or torch.distributed.get_rank() == only
    if alone:
        do(wrapped, lora)
    picture = None if only is not None or degrees is None else running.drawn(wrapped, call)
    told = ""
    if degrees is None:
        return running.drawn(pipe, call)
    try:
        wrapped.unwrap()
    except ValueError as error:
        told = str(error)
        if picture is not None:  # the refusal has changed nothing
            assert running.error(running.drawn(wrapped, call), picture) <= running.TOLERANCE
        if alone:
            undo(wrapped)
        wrapped.unwrap()
    return picture, told, same(before, pipe.transformer.state_dict()), running.drawn(pipe, call)


@pytest.mark.parametrize(
    ("degrees", "change", "refused"),
    [
        (FSDP, "lora", "has got 'transformer_blocks.0.attn.to_q.base_layer.weight'"),
        (TENSOR, "fused", "has got 'transformer_blocks.0.attn.to_qkv'"),
    ],
)
def test_unwrap_refuses_a_changed_model_and_gives_it_back_when_that_is_undone(
    pool, folder_of, degrees, change, refused
):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    expected, bare = changed(path, None, call, change), running.bare(path, call)
    for picture, told, whole, after in pool.run(2, changed, path, degrees, call, change):
        assert running.error(picture, expected) <= running.TOLERANCE
        assert refused in told and "unload_lora_weights()" in told
        assert whole and running.error(after, bare) <= running.TOLERANCE


@pytest.mark.parametrize(("degrees", "change"), [(FSDP, "lora"), (TENSOR, "fused")])
def test_all_ranks_refuse_what_one_has_changed(pool, folder_of, degrees, change):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    for _, told, whole, _ in pool.run(2, changed, path, degrees, call, change, 1):
        assert "has got" in told and whole


EVERYWHERE = ("to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.0.proj", "ff.net.2", "proj_out", "norm1.linear")


def loads_late(path, degrees, call):
    """Load, change, fuse and unload adapters after the wrap; return images, and whether all weights are restored."""
    pipe = running.fresh(path)
    loras = {
        name: adapter(pipe, *more) for name, more in {"a": (2, EVERYWHERE), "b": (3,), "c": (2, EVERYWHERE, 7)}.items()
    }
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    with everything:
        wrapped = running.wrap(pipe, degrees) if degrees else pipe
        pictures = []
        wrapped.load_lora_weights(loras["a"], adapter_name="a")
        pictures.append(running.drawn(wrapped, call))
        pipe.load_lora_weights(loras["b"], adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.7, 0.3])
        pictures.append(running.drawn(wrapped, call))
        pipe.fuse_lora(adapter_names=["a", "b"])
        pictures.append(running.drawn(wrapped, call))
        pipe.unfuse_lora()
        pipe.delete_adapters("b")
        pictures.append(running.drawn(wrapped, call))
        pipe.load_lora_weights(loras["c"], adapter_name="a", hotswap=True)
        pictures.append(running.drawn(wrapped, call))
        if degrees:
            wrapped.unwrap()
        pictures.append(running.drawn(pipe, call))
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    return pictures, max((x - after[name]).abs().max() for name, x in before.items())


@pytest.fixture(scope="module")
def adapted(folder_of):
    return loads_late(folder_of("flux"), None, tiny.call_of("flux", 1))[0]


@pytest.mark.parametrize(
    "degrees", [TENSOR, TENSOR | {"split_scheme": "row"}, PIPED], ids=["tensor", "tensor by row", "pipefusion"]
)
def test_adapters_come_and_go_behind_the_wrap(pool, folder_of, adapted, degrees):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    assert all(running.error(*pair) > 1e-2 for pair in (adapted[:2], adapted[3:5]))
    for pictures, changed_by in pool.run(2, loads_late, path, degrees, call):
        errors = [running.error(*pair) for pair in zip(pictures, adapted, strict=True)]
        assert max(errors) <= running.TOLERANCE
        assert changed_by <= 1e-5  # fused equals unfused


def fuses_late(path, call):
    """Return the messages of a sharded pipeline's methods that fuse weights, and the image and weights after them."""
    pipe = running.fresh(path)
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    wrapped = running.wrap(pipe, FSDP)
    wrapped.load_lora_weights(adapter(running.fresh(path)))
    told = []
    for fuse in (wrapped.transformer.fuse_qkv_projections, wrapped.fuse_lora):
        with pytest.raises(ValueError) as refused:
            fuse()
        told.append(str(refused.value))
    picture = running.drawn(wrapped, call)
    wrapped.unload_lora_weights()
    wrapped.unwrap()
    return told, picture, same(before, pipe.transformer.state_dict())


def test_models_in_shares_refuse_to_fuse_weights(pool, folder_of):
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    adapted = changed(path, None, call, "lora")
    for told, picture, whole in pool.run(2, fuses_late, path, call):
        assert all("before the wrap" in one for one in told)
        assert running.error(picture, adapted) <= running.TOLERANCE and whole


def loads_early(path, degrees, call):
    """Load adapters before the wrap; return images with and without them, and whether unwrap() restored everything."""
    pipe = running.fresh(path)
    pipe.load_lora_weights(adapter(pipe))
    wrapped = running.wrap(pipe, degrees)
    adapted = running.drawn(wrapped, call)
    if degrees == TENSOR:
        wrapped.unload_lora_weights()
    plain = running.drawn(wrapped, call)
    wrapped.unwrap()
    return adapted, plain, running.drawn(pipe, call)


@pytest.mark.parametrize("degrees", [TENSOR, FSDP])
def test_adapters_that_are_there_before_the_wrap_are_divided(pool, folder_of, degrees):
    """Adapters of tensor-parallel models can also be unloaded while the models are wrapped."""
    path, call = folder_of("flux"), tiny.call_of("flux", 1)
    bare, expected = running.bare(path, call), changed(path, None, call, "lora")
    for adapted, plain, after in pool.run(2, loads_early, path, degrees, call):
        assert running.error(adapted, expected) <= running.TOLERANCE
        unloaded = bare if degrees == TENSOR else expected
        assert running.error(plain, unloaded) <= running.TOLERANCE
        assert running.error(after, unloaded) <= running.TOLERANCE
