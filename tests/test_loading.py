"""Loading: each rank reads and holds only its share, and damaged files are reported before any rank waits."""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import diffusers
import pytest
import running
import tiny
import torch
import torch.distributed as dist
import whole
from safetensors.torch import load_file, save_file

import xfuser
from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import get_world_group
from xfuser.weights.checkpoint import entries_of, node_group, read_shared
from xfuser.weights.loading import load_pipeline
from xfuser.weights.placement import join_groups
from xfuser.weights.skeleton import Folder, skeleton

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def configs(path, **degrees):
    return xFuserArgs(model=path, dtype="float32", **degrees).create_config()


def draw(path, degrees, call, options=None):
    """Return an image of a pipeline loaded for these degrees, and its transformer's weights after unwrap()."""
    engine_config, _ = configs(path, **degrees)
    pipe = load_pipeline(engine_config, None, **options or {})
    pipe.set_progress_bar_config(disable=True)
    held = sum(weight.numel() for weight in pipe.transformer.parameters())
    pipe = xDiTParallel(pipe, engine_config)
    picture = running.array(pipe(**call, generator=running.seeded()))
    weights = {name: x.clone() for name, x in pipe.unwrap().transformer.state_dict().items()}
    return picture, held, weights


def in_shards(path, folder, variant=None):
    """Copy a pipeline's folder, with the transformer's weights in several files and an index."""
    copy = shutil.copytree(path, folder)
    (copy / WEIGHTS).unlink()
    transformer = running.loaded(path).transformer
    transformer.save_pretrained(copy / "transformer", max_shard_size="10KB", variant=variant)
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 2
    return str(copy)


@pytest.mark.parametrize(
    ("family", "ranks", "degrees"),
    [
        ("sd3", 2, {"pipefusion_parallel_degree": 2}),
        ("flux", 4, {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}),
        ("hunyuan_dit", 2, {"pipefusion_parallel_degree": 2}),  # long skips, and blocks that share submodules
        ("dit", 2, {"ulysses_degree": 2}),
        ("flux", 2, {"tensor_parallel_degree": 2}),
        ("hunyuan_dit", 4, {"tensor_parallel_degree": 2, "pipefusion_parallel_degree": 2}),
    ],
)
def test_loaded_for_its_degrees_a_pipeline_draws_as_before_and_is_whole_when_unwrapped(
    pool, folder_of, family, ranks, degrees
):
    """Only warm-up steps, in which PipeFusion is exact."""
    path, call = folder_of(family), tiny.call_of(family, 2)
    expected = running.bare(path, call)
    before = running.loaded(path).transformer.state_dict()
    warm = {"warmup_steps": 3} if "pipefusion_parallel_degree" in degrees else {}
    for picture, held, weights in pool.run(ranks, draw, path, degrees | warm, call):
        assert running.error(picture, expected) <= running.TOLERANCE
        assert (held < 0.9 * sum(x.numel() for x in before.values())) == ("ulysses_degree" not in degrees or ranks == 4)
        assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants(pool, folder_of, tmp_path, variant):
    path, call = folder_of("sd3"), tiny.call_of("sd3")
    copy = in_shards(path, tmp_path / "copy", variant)
    options = {"variant": variant} if variant else {}
    for picture, *_ in pool.run(2, draw, copy, {"pipefusion_parallel_degree": 2, "warmup_steps": 3}, call, options):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE


def from_pretrained_matches(path):
    """Check that from_pretrained() gives the same weights, dtypes and configuration as Diffusers."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "transformer_2"))
    config, _ = configs(path, ulysses_degree=2)
    ours = xfuser.xFuserWanPipeline.from_pretrained(path, config, torch.bfloat16, **absent).transformer
    theirs = diffusers.WanTransformer3DModel.from_pretrained(f"{path}/transformer", torch_dtype=torch.bfloat16)
    assert {name: x.dtype for name, x in ours.state_dict().items()} == {
        name: x.dtype for name, x in theirs.state_dict().items()
    }
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(x, buffers[name]) and x.dtype == buffers[name].dtype for name, x in ours.named_buffers())
    assert ours.config == theirs.config and not ours.training


def test_weights_are_those_that_diffusers_loads(pool, tmp_path):
    """The class has parts that stay in float32."""
    pool.run(2, from_pretrained_matches, whole.save("wan", tmp_path))


def with_ignored(path, degrees):
    """Return the weights of a folder's transformer after loading and unwrap(), or the error."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "transformer_2"))
    config, _ = configs(path, **degrees)
    try:
        pipe = xfuser.xFuserWanPipeline.from_pretrained(path, config, torch.float32, **absent)
    except ValueError as error:
        return str(error)
    return {name: x.clone() for name, x in pipe.unwrap().transformer.state_dict().items()}


def add_to_checkpoint(path, folder, key):
    copy = shutil.copytree(path, folder)
    weights = load_file(copy / WEIGHTS)
    save_file(weights | {key: torch.ones(3)}, copy / WEIGHTS)
    return str(copy), weights


def test_keys_that_a_class_says_to_ignore_are_ignored(pool, tmp_path):
    """Checkpoints of Wan have norms that the model does not use; other surplus keys are refused."""
    path = whole.save("wan", tmp_path)
    copy, weights = add_to_checkpoint(path, tmp_path / "ignored", "blocks.0.attn2.norm_added_q.weight")
    for degrees in ({"ulysses_degree": 2}, {"pipefusion_parallel_degree": 2}):
        for loaded in pool.run(2, with_ignored, copy, degrees):
            assert loaded.keys() == weights.keys() and all(torch.equal(x, weights[name]) for name, x in loaded.items())
    copy, _ = add_to_checkpoint(path, tmp_path / "surplus", "blocks.0.attn2.norm_other.weight")
    for told in pool.run(2, with_ignored, copy, {"ulysses_degree": 2}):
        assert "has no place for 'blocks.0.attn2.norm_other.weight'" in told


def read_elsewhere(path):
    """Return tensors that a node's ranks read, whole and in parts, while the default device is not the CPU."""
    join_groups(configs(path, pipefusion_parallel_degree=2)[0])
    rank, world = get_world_group().rank_in_group, get_world_group()
    held = entries_of(f"{path}/{WEIGHTS}")
    with torch.device("meta"):
        node = node_group(world, "gloo")
        rows = {name: (0, (range(rank, entry.shape[0], 2)[:1],)) for name, entry in held.items()}
        rows = {name: None if index % 2 else rows[name] for index, name in enumerate(held)}
        parts = dict(read_shared(held, rows, node, lambda name, x: x))
        node.destroy()
    return parts


def test_files_are_read_to_the_cpu_whatever_the_default_device_is(pool, folder_of):
    path = folder_of("sd3")
    weights = load_file(f"{path}/{WEIGHTS}")
    for rank, parts in enumerate(pool.run(2, read_elsewhere, path)):
        for index, (name, x) in enumerate(parts.items()):
            expected = weights[name] if index % 2 else weights[name][rank : rank + 1]
            assert x.device.type == "cpu" and torch.equal(x, expected)


# The cost of a load, with one process per rank


def big(folder, path, layers=8, width=768):
    """Save a pipeline with a transformer of about 180 MB in bfloat16, in four files."""
    copy = shutil.copytree(path, folder)
    (copy / WEIGHTS).unlink()
    changes = {"num_layers": layers, "num_attention_heads": 12, "attention_head_dim": width // 12}
    changes |= {"cross_attention_dim": width}
    model = skeleton(lambda: tiny.pixart_transformer(**changes), torch.bfloat16)
    (copy / "transformer/config.json").unlink()
    model.save_config(copy / "transformer")
    names, parts, places = list(model.state_dict().items()), 4, {}
    for part in range(parts):
        file = f"diffusion_pytorch_model-{part + 1:05}-of-{parts:05}.safetensors"
        tensors = {name: torch.empty(x.shape, dtype=torch.bfloat16) for name, x in names[part::parts]}
        for x in tensors.values():
            x.view(-1).view(torch.uint8).random_(0, 60)
        save_file(tensors, copy / "transformer" / file)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": places}
    (copy / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return str(copy)


def status(key):
    """Return a value of /proc for this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def cost(rank, world, store, paths, degrees, answers):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        small, large = (xFuserArgs(model=path, dtype="bfloat16", **degrees).create_config()[0] for path in paths)
        load_pipeline(small)  # imports must not count
        Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
        before, read = status("VmRSS"), bytes_read()
        pipe = load_pipeline(large)
        share = sum(weight.nbytes for weight in pipe.transformer.parameters())
        answers.put((status("VmHWM") - before, share, bytes_read() - read))
    except BaseException as error:
        answers.put(error)
        raise


def costs(world, tmp_path, paths, degrees):
    """Return each rank's high-water mark and share, in processes forked from a server with the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["xfuser.weights.loading", "transformers", "running"])
    answers = context.Queue()
    store = tmp_path / "_".join(["store", str(world), *degrees])
    arguments = (world, str(store), paths, degrees, answers)
    ranks = [context.Process(target=cost, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for rank in ranks:
        rank.start()
    told = [answers.get(timeout=60) for _ in ranks]
    assert not [answer for answer in told if isinstance(answer, BaseException)], told
    for rank in ranks:
        rank.join()
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_needs_memory_for_its_share_and_one_file(tmp_path, folder_of):
    base = folder_of("pixart_sigma")
    paths = _, path = big(tmp_path / "small", base, layers=4, width=48), big(tmp_path / "big", base)
    sizes = [os.path.getsize(file) for file in Path(path, "transformer").glob("*.safetensors")]
    for method, world in (("pipefusion", 2), ("pipefusion", 4), ("tensor", 4)):
        for peak, share, _ in costs(world, tmp_path, paths, {f"{method}_parallel_degree": world}):
            assert share < 1.2 * sum(sizes) / world
            assert 0.99 * share <= peak <= share + max(sizes)  # pages that were already free do not count
    read = sum(read for _, _, read in costs(2, tmp_path, paths, {"ulysses_degree": 2}))
    assert read <= 1.1 * sum(sizes)


# Damage


def damaged(folder, path, damage):
    copy = Path(in_shards(path, folder))
    damage(copy / "transformer", sorted((copy / "transformer").glob("*.safetensors"))[1])
    return str(copy)


def truncate(_, file):
    file.write_bytes(file.read_bytes()[:-8])


def empty(_, file):
    file.write_bytes(b"")


def lose(_, file):
    file.unlink()


def drop(_, file):
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def drop_everywhere(folder, file):
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["weight_map"][min(load_file(file))]
    index.write_text(json.dumps(told))
    drop(folder, file)


def add(_, file):
    save_file(load_file(file) | {"base_layer.lora_A": torch.ones(2)}, file)


def reshape(_, file):
    tensors = load_file(file)
    save_file(tensors | {min(tensors): torch.ones(5, 1)}, file)


def text_encoder(folder, _):
    truncate(None, folder.parent / "text_encoder_3/model.safetensors")


def header(_, file):
    file.write_bytes((9).to_bytes(8, "little") + bytes(9))


def config(folder, _):
    (folder / "config.json").write_text("[]")


def tokenizer(folder, _):
    next((folder.parent / "tokenizer").glob("*.json")).write_text("{")


def scheduler(folder, _):
    shutil.rmtree(folder.parent / "scheduler")


def newer(folder, _):
    index = folder.parent / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "StableDiffusion9Pipeline"))


KEY = "'time_text_embed.timestep_embedder.linear_1.weight'"
DAMAGES = {
    truncate: ("00002-of", f"is truncated: {KEY}"),
    empty: ("00002-of", "is truncated"),
    lose: ("00002-of", "is missing", KEY),
    drop: ("00002-of", f"lacks {KEY}"),
    drop_everywhere: (f"SD3Transformer2DModel needs {KEY}, missing there",),
    add: ("00002-of", "no place for 'base_layer.lora_A'", "unload_lora_weights"),
    reshape: ("00002-of", f"{KEY} has the shape [5, 1]"),
    text_encoder: ("text_encoder_3/model.safetensors is truncated",),
    header: ("00002-of", "is damaged"),
    config: ("transformer/config.json must hold a JSON object, and holds a list",),
    tokenizer: ("tokenizer/", ".json cannot be read as JSON"),
    scheduler: ("has no folder scheduler",),
    newer: ("StableDiffusion9Pipeline", "does not have"),
}


def test_what_diffusers_can_load_is_not_damaged(folder_of, tmp_path):
    """The class of a pipeline with its own code is a list in the index; some JSON files hold lists."""
    folder = Path(shutil.copytree(folder_of("sd3"), tmp_path / "copy"))
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["pipeline", "Own"]}))
    (folder / "text_encoder/modules.json").write_text("[]")
    assert Folder(str(folder), None, None, set()).damage() == ""
    os.remove(index)
    assert Folder(str(folder), None, None, set()).damage() == ""


def refusal(path):
    try:
        load_pipeline(configs(path, pipefusion_parallel_degree=2)[0])
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_by_all_ranks(pool, folder_of, tmp_path, damage):
    path = damaged(tmp_path / "copy", folder_of("sd3"), damage)
    for told in pool.run(2, refusal, path):
        assert all(part in told for part in DAMAGES[damage]), told
