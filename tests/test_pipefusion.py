"""PipeFusion: synchronous steps equal serial, other steps equal an independent oracle, for any number of stages."""

from unittest import mock

import diffusers
import numpy as np
import parts
import pytest
import running
import tiny
import torch
from test_modular import assembled
from torch.distributed import distributed_c10d as c10d

from xfuser.core.attention.kv_buffer import KVBuffer
from xfuser.methods.tokens import TokenShares
from xfuser.testing import oracle

STEPS = 4
HYBRIDS = {
    "cfg2": {"use_cfg_parallel": True},
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "dp2": {"data_parallel_degree": 2},
}
SCHEDULERS = [
    ("pixart_sigma", "DDIMScheduler", {}),
    ("pixart_sigma", "DDPMScheduler", {}),
    ("pixart_sigma", "DEISMultistepScheduler", {}),
    ("pixart_sigma", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("pixart_sigma", "DPMSolverSinglestepScheduler", {}),
    ("pixart_sigma", "EulerDiscreteScheduler", {}),
    ("pixart_sigma", "EulerAncestralDiscreteScheduler", {}),
    ("pixart_sigma", "HeunDiscreteScheduler", {}),
    ("pixart_sigma", "KDPM2AncestralDiscreteScheduler", {}),
    ("pixart_sigma", "LCMScheduler", {}),
    ("pixart_sigma", "PNDMScheduler", {"skip_prk_steps": True}),
    ("pixart_sigma", "UniPCMultistepScheduler", {}),
    ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
    ("dit", "EulerDiscreteScheduler", {}),
    ("hunyuan_dit", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
]


def degrees(stages, patches, warmup, **others):
    return {"pipefusion_parallel_degree": stages, "num_pipeline_patch": patches, "warmup_steps": warmup, **others}


def call_of(family, images=1, **changes):
    return tiny.call_of(family, images, **{"num_inference_steps": STEPS} | changes)


def scheduled(pipe, scheduler):
    """Return the pipeline's scheduler, or one of the named class with changes of its configuration."""
    if not scheduler:
        return pipe.scheduler
    name, changes = scheduler
    config = dict(pipe.scheduler.config) | changes
    return getattr(diffusers, name).from_config({key: config[key] for key in config if not key.startswith("_")})


@running.remembered
def displaced(path, call, patches, warmup, scheduler=None):
    """Return the oracle's result."""
    pipe = running.loaded(path)
    original = pipe.scheduler
    pipe.scheduler = scheduled(pipe, scheduler)
    try:
        with oracle.displaced(pipe, patches, warmup):
            return running.array(pipe(**call, generator=running.seeded()))
    finally:
        pipe.scheduler = original


def piped(path, asked, calls, scheduler=None):
    """Return one image per call, of the wrapped pipeline or of the unwrapped one without degrees."""
    pipe = running.loaded(path)
    original = pipe.scheduler
    pipe.scheduler = scheduled(pipe, scheduler)
    try:
        parallel = running.wrap(pipe, asked)
        pictures = [running.array(parallel(**call, generator=running.seeded())) for call in calls]
        running.unwrap(parallel)
        return pictures
    finally:
        pipe.scheduler = original


def check(pool, ranks, path, asked, call, expected, scheduler=None):
    for (picture,) in pool.run(ranks, piped, path, asked, [call], scheduler):
        assert running.error(picture, expected) <= running.TOLERANCE


@pytest.mark.parametrize("patches", [1, 3])
@pytest.mark.parametrize("family", ["flux", "hunyuan_dit", "pixart_alpha", "sd3"])
def test_synchronous_steps_equal_serial(pool, folder_of, family, patches):
    call = call_of(family, 3 if patches == 3 else 1)
    expected = running.bare(folder_of(family), call)
    check(pool, 2, folder_of(family), degrees(2, patches, STEPS), call, expected)


@pytest.mark.parametrize("family", ["dit", "flux", "pixart_sigma", "sd3"])
def test_displaced_steps_equal_the_oracle_on_any_number_of_stages(pool, folder_of, family):
    path, call = folder_of(family, True), call_of(family)
    serial = running.bare(path, call)
    for patches, warmup in ((2, 1), (3, 2), (4, 1)):
        expected = displaced(path, call, patches, warmup)
        assert warmup == 2 or running.error(expected, serial) >= 1e-2  # staleness has an effect
        for stages in (1, 2):
            check(pool, stages, path, degrees(stages, patches, warmup), call, expected)


@pytest.mark.parametrize("family", ["flux", "hunyuan_dit"])
def test_four_stages(pool, folder_of, family):
    path, call = folder_of(family, True), call_of(family, 3)
    for patches, warmup in ((4, 1), (3, 0)):
        check(pool, 4, path, degrees(4, patches, warmup), call, displaced(path, call, patches, warmup))


@pytest.mark.parametrize("hybrid", HYBRIDS)
@pytest.mark.parametrize("family", ["flux", "hunyuan_dit"])
def test_hybrids_equal_the_oracle(pool, folder_of, family, hybrid):
    path, call = folder_of(family, True), call_of(family, 3 if hybrid == "dp2" else 1)
    expected = displaced(path, call, 2, 1)
    check(pool, 4, path, degrees(2, 2, 1, **HYBRIDS[hybrid]), call, expected)


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_preview_on_one_stage_combines_too(pool, folder_of, hybrid):
    """M > 1 at degree 1, with another method on two ranks; patches are smaller than the group's shards."""
    path, call = folder_of("sd3", True), call_of("sd3", 2)
    check(pool, 2, path, degrees(1, 5, 1, **HYBRIDS[hybrid]), call, displaced(path, call, 5, 1))


def test_sequence_ranks_outnumber_the_tokens_of_a_patch(pool, folder_of):
    path, call = folder_of("flux", True), call_of("flux")
    check(pool, 4, path, degrees(1, 7, 1, ulysses_degree=2, ring_degree=2), call, displaced(path, call, 7, 1))


@pytest.mark.parametrize("images", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2])
def test_sequential_guidance(pool, folder_of, stages, images):
    path = folder_of("flux", True)
    call = call_of("flux", images, true_cfg_scale=2.5, negative_prompt=["a cat"] * images)
    expected = displaced(path, call, 3, 1)
    check(pool, 2 * stages, path, degrees(stages, 3, 1, use_cfg_parallel=True), call, expected)
    check(pool, stages, path, degrees(stages, 3, 1), call, expected)


@pytest.mark.parametrize(("family", "name", "changes"), SCHEDULERS, ids=[name for _, name, _ in SCHEDULERS])
def test_scheduler(pool, folder_of, family, name, changes):
    """State across steps, several evaluations per step, and noise sampled in a step work as without patches."""
    path, call = folder_of(family), call_of(family, guidance_scale=1.5)
    scheduler = (name, changes)
    (serial,) = piped(path, None, [call], scheduler)
    check(pool, 2, path, degrees(2, 3, STEPS), call, serial, scheduler)
    check(pool, 2, path, degrees(2, 3, 1), call, displaced(path, call, 3, 1, scheduler), scheduler)


def generator_after(path, asked):
    """Return the state of the caller's generator after a call whose scheduler samples noise."""
    pipe = running.loaded(path)
    original = pipe.scheduler
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(original.config)
    generator = running.seeded()
    parallel = running.wrap(pipe, asked)
    parallel(**call_of("pixart_sigma"), generator=generator)
    running.unwrap(parallel)
    pipe.scheduler = original
    return generator.get_state()


def test_generators_end_where_serial_leaves_them(pool, folder_of):
    expected = generator_after(folder_of("pixart_sigma"), None)
    for state in pool.run(2, generator_after, folder_of("pixart_sigma"), degrees(2, 3, 1)):
        assert torch.equal(state, expected)


def test_thirty_steps_and_calls_of_other_shapes(pool, folder_of):
    path = folder_of("sd3", True)
    calls = [
        call_of("sd3", 1, num_inference_steps=30),
        call_of("sd3", 2, height=112, width=80),
        call_of("sd3", 3, height=48, num_inference_steps=2),
        call_of("sd3", 1, guidance_scale=1.0),
        call_of("sd3", 1, num_inference_steps=1),
        call_of("sd3", 1),
    ]
    expected = [displaced(path, call, 3, 1) for call in calls]
    for pictures in pool.run(2, piped, path, degrees(2, 3, 1), calls):
        for picture, reference in zip(pictures, expected, strict=True):
            assert running.error(picture, reference) <= running.TOLERANCE


def without_refresh(path, asked, call, stream):
    """A broken engine: the first stage does not update one stream in its buffers after the synchronous step."""
    write, rows_of = KVBuffer._write, TokenShares.rows
    part = {}

    def noted(shares, streams, own):
        if "text" not in streams:
            return rows_of(shares, streams, own)
        part["text"], part["asynchronous"] = streams.index("text"), not shares.is_whole
        part["count"] = len(streams)
        return rows_of(shares, streams, own)

    def lame(self, name, x, dim, where, total):
        if part["asynchronous"]:
            rows = x.split([length for _, length in where], dim=dim)
            kept = [i for i in range(len(where)) if (i % part["count"] == part["text"]) != (stream == "text")]
            x = torch.cat([rows[i] for i in kept], dim=dim)
            where = [where[i] for i in kept]
        return write(self, name, x, dim, where, total)

    if torch.distributed.get_rank() == 0:
        TokenShares.rows, KVBuffer._write = noted, lame
    try:
        return piped(path, asked, [call])
    finally:
        KVBuffer._write, TokenShares.rows = write, rows_of


@pytest.mark.parametrize("stream", ["image", "text"])
def test_a_stream_that_is_not_refreshed_would_be_noticed(pool, folder_of, stream):
    path, call = folder_of("flux", True), call_of("flux")
    expected = displaced(path, call, 2, 1)
    for (picture,) in pool.run(2, without_refresh, path, degrees(2, 2, 1), call, stream):
        assert running.error(picture, expected) > 100 * running.TOLERANCE


def image_to_image(path, asked, inpaint):
    pipe = running.loaded(path)
    family = "sd3" if "sd3" in path else "flux"
    kind = diffusers.AutoPipelineForInpainting if inpaint else diffusers.AutoPipelineForImage2Image
    pipe = kind.from_pipe(pipe)
    call = call_of(family, 2, num_inference_steps=6, strength=0.7, image=running.picture())
    if inpaint:
        call["mask_image"] = torch.zeros(1, 1, 80, 48)
        call["mask_image"][..., :40, :] = 1
    if asked == "oracle":
        with oracle.displaced(pipe, 3, 1):
            return running.array(pipe(**call, generator=running.seeded()))
    parallel = running.wrap(pipe, asked)
    result = running.array(parallel(**call, generator=running.seeded()))
    running.unwrap(parallel)
    return result


@pytest.mark.parametrize("inpaint", [False, True])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_image_to_image_and_inpainting(pool, folder_of, family, inpaint):
    path = folder_of(family, True)
    for warmup, reference in ((6, None), (1, "oracle")):
        expected = image_to_image(path, reference, inpaint)
        for result in pool.run(2, image_to_image, path, degrees(2, 3, warmup), inpaint):
            assert running.error(result, expected) <= running.TOLERANCE


def watched(path, asked, interrupt_after=None):
    """Return the callback's arguments, the progress bar's updates, and the image."""
    pipe, seen, shown = running.loaded(path), [], []

    def callback(pipe, step, timestep, values):
        seen.append((step, float(timestep), values["latents"].numpy().copy(), pipe.num_timesteps))
        if step == interrupt_after:
            pipe._interrupt = True
        if step == 1:  # a callback may change the latents
            values["latents"] = values["latents"] * 1.5
        return values

    make = pipe.progress_bar

    def progress_bar(*args, **kwargs):
        bar = make(*args, **kwargs)
        update = bar.update
        bar.update = lambda n=1: (shown.append(n), update(n))
        shown.append(bar.total)
        return bar

    pipe.progress_bar = progress_bar
    try:
        call = call_of("sd3" if "sd3" in path else "flux", callback_on_step_end=callback)
        if asked == "oracle":
            with oracle.displaced(pipe, 3, 1):
                picture = running.array(pipe(**call, generator=running.seeded()))
        else:
            parallel = running.wrap(pipe, asked)
            picture = running.array(parallel(**call, generator=running.seeded()))
            running.unwrap(parallel)
    finally:
        del pipe.progress_bar
    return picture, seen, shown


@pytest.mark.parametrize("interrupt_after", [None, 1, 2])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_callbacks_and_progress_see_steps(pool, folder_of, family, interrupt_after):
    path = folder_of(family, True)
    picture, seen, shown = watched(path, "oracle", interrupt_after)
    for ours, our_seen, our_shown in pool.run(2, watched, path, degrees(2, 3, 1), interrupt_after):
        assert running.error(ours, picture) <= running.TOLERANCE
        assert our_shown == shown
        assert [(step, t, total) for step, t, _, total in our_seen] == [(step, t, total) for step, t, _, total in seen]
        for (_, _, latents, _), (_, _, reference, _) in zip(our_seen, seen, strict=True):
            assert running.error(latents, reference) <= running.TOLERANCE


def watched_by_one(path, call, asked):
    """Return the image, and the latents that the callback of rank 0 sees; other ranks have no callback."""
    parallel, seen = running.wrap(running.loaded(path), asked), []

    def callback(pipe, step, timestep, values):
        seen.append(values["latents"].numpy().copy())
        return {}

    if not torch.distributed.get_rank():
        call = call | {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return picture, seen


def test_one_rank_may_have_the_callback(pool, folder_of):
    path, call = folder_of("sd3", True), call_of("sd3", num_inference_steps=4)
    expected = displaced(path, call, 2, 1)
    (picture, seen), (other, _) = pool.run(2, watched_by_one, path, call, degrees(2, 2, 1))
    assert max(running.error(one, expected) for one in (picture, other)) <= running.TOLERANCE
    assert len(seen) == 4


def older_callback(path, asked, scheduler):
    pipe, seen = running.loaded(path), []
    original = pipe.scheduler
    pipe.scheduler = scheduled(pipe, scheduler)
    parallel = running.wrap(pipe, asked)
    call = call_of("pixart_sigma", callback=lambda step, t, x: seen.append((step, float(t), x.numpy().copy())))
    parallel(**call, callback_steps=2, generator=running.seeded())
    running.unwrap(parallel)
    pipe.scheduler = original
    return seen


@pytest.mark.parametrize("scheduler", [None, ("HeunDiscreteScheduler", {})])
def test_older_callbacks_see_steps(pool, folder_of, scheduler):
    path = folder_of("pixart_sigma")
    expected = older_callback(path, None, scheduler)
    for seen in pool.run(2, older_callback, path, degrees(2, 3, STEPS), scheduler):
        assert [one[:2] for one in seen] == [one[:2] for one in expected]
        for one, reference in zip(seen, expected, strict=True):
            assert running.error(one[2], reference[2]) <= running.TOLERANCE


def unwrapped(path):
    pipe = running.loaded(path)
    before, expected = running.fingerprint(pipe), running.array(pipe(**call_of("dit"), generator=running.seeded()))
    before = running.fingerprint(pipe)
    parallel = running.wrap(pipe, degrees(2, 2, 1))
    parallel(**call_of("dit"), generator=running.seeded())
    with pytest.raises(ValueError, match=r"call unwrap\(\) on it first"):
        running.wrap(pipe, {"ulysses_degree": 2})
    parallel.unwrap()
    return before == running.fingerprint(pipe) and np.array_equal(
        running.array(pipe(**call_of("dit"), generator=running.seeded())), expected
    )


def test_unwrap_gives_every_stage_its_blocks_back(pool, folder_of):
    assert all(pool.run(2, unwrapped, folder_of("dit")))


def with_adapter(path, adapter, fuse):
    """Load a LoRA after the wrap; return images at each point, and whether unwrap() restores all weights."""
    pipe, call = running.loaded(path), call_of("flux")
    before, pictures = running.fingerprint(pipe), {}

    def change():
        pipe.transformer.load_lora_adapter(dict(adapter), prefix=None)
        if fuse:
            pipe.fuse_lora()
            pipe.transformer.unload_lora()
            pipe.transformer.fuse_qkv_projections()

    def draw(name, pipe):
        pictures[name] = running.array(pipe(**call, generator=running.seeded()))

    draw("plain", pipe)
    parallel = running.wrap(pipe, degrees(2, 2, STEPS))
    change()
    draw("wrapped", parallel)
    names = set(parallel.transformer.state_dict())
    parallel.unwrap()
    draw("unwrapped", pipe)
    found = pipe.transformer.state_dict()
    again = running.wrap(pipe, degrees(2, 2, STEPS))
    draw("again", again)
    again.unwrap()
    if not fuse:
        pipe.transformer.unload_lora()
        draw("unloaded", pipe)
        assert before[1] == running.fingerprint(pipe)[1]
    running.loaded.cache_clear()
    pipe = running.loaded(path)
    change()
    draw("expected", pipe)
    running.loaded.cache_clear()
    whole = pipe.transformer.state_dict()
    same = whole.keys() == found.keys() and all(torch.equal(x, found[name]) for name, x in whole.items())
    return pictures, same and names < whole.keys()


@pytest.mark.parametrize("fuse", [False, True], ids=["lora", "fused"])
def test_unwrap_gives_blocks_back_that_changed_after_the_wrap(pool, folder_of, fuse):
    peft = pytest.importorskip("peft")
    model = tiny.flux_transformer()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    adapter = peft.get_peft_model_state_dict(model)
    for pictures, same in pool.run(2, with_adapter, folder_of("flux", True), adapter, fuse):
        assert same and running.error(pictures["expected"], pictures["plain"]) > 100 * running.TOLERANCE
        for name in ("wrapped", "unwrapped", "again"):
            assert running.error(pictures[name], pictures["expected"]) <= running.TOLERANCE
        assert fuse or running.error(pictures["unloaded"], pictures["plain"]) <= running.TOLERANCE


def changed_on_one(path):
    """Change a block on one rank so that it cannot be sent; return the error, then check that calls still work."""
    pipe, call = running.loaded(path), call_of("sd3", 2)
    before = running.fingerprint(pipe)
    parallel = running.wrap(pipe, degrees(2, 2, STEPS, data_parallel_degree=2))
    block, last = parallel.transformer.transformer_blocks[-1], torch.distributed.get_rank() == 3
    if last:
        block.extra, block.marked = torch.nn.Parameter(torch.zeros(1)), lambda: None
    with pytest.raises(ValueError) as error:
        parallel.unwrap()
    picture = running.array(parallel(**call, generator=running.seeded()))
    if last:
        del block.extra, block.marked
    parallel.unwrap()
    return str(error.value), picture, before[1] == running.fingerprint(pipe)[1]


def test_all_ranks_refuse_what_one_cannot_give(pool, folder_of):
    path = folder_of("sd3")
    expected = running.bare(path, call_of("sd3", 2))
    for message, picture, same in pool.run(4, changed_on_one, path):
        assert "transformer_blocks.2 cannot be pickled" in message and "undo the change first" in message
        assert running.error(picture, expected) <= running.TOLERANCE and same


def refusals(path):
    """Return the messages of refusals before the first step, and whether the pipeline still works."""
    pipe = running.loaded(path)
    messages = {}

    def refused(name, asked, **changes):
        parallel = None
        try:
            parallel = running.wrap(pipe, asked)
            parallel(**call_of("sd3", **changes))
        except ValueError as error:
            messages[name] = str(error)
        finally:
            if parallel:
                running.unwrap(parallel)

    refused("stages", degrees(2, 2, 1, attn_layer_num_for_pp=[1, 1]))
    refused("count", degrees(2, 2, 1, attn_layer_num_for_pp=[3]))
    refused("rows", degrees(2, 6, 1))
    refused("warmup", degrees(2, 2, 5))
    refused("skip", degrees(2, 2, 1), skip_guidance_layers=[0])
    original = pipe.scheduler
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True)
    refused("thresholding", degrees(2, 2, 1))
    pipe.scheduler = original
    return messages, piped(path, degrees(2, 2, 1), [call_of("sd3")])[0]


def test_refusals_name_the_reason_and_leave_the_pipeline_working(pool, folder_of):
    path = folder_of("sd3", True)
    expected = displaced(path, call_of("sd3"), 2, 1)
    for messages, after in pool.run(2, refusals, path):
        assert "add up to the 3 blocks" in messages["stages"]
        assert "each of the 2 stages" in messages["count"]
        assert "num_pipeline_patch=6 is more than the 5 rows" in messages["rows"]
        assert "warmup_steps=5 is more than the 4 steps" in messages["warmup"]
        assert "skip_guidance_layers" in messages["skip"]
        assert "quantile of the full latents" in messages["thresholding"]
        assert running.error(after, expected) <= running.TOLERANCE


def more_stages_than_blocks(path):
    with pytest.raises(ValueError) as error:
        running.wrap(running.loaded(path), degrees(4, 4, 1))
    return str(error.value)


def test_more_stages_than_blocks_are_refused(pool, folder_of):
    for message in pool.run(4, more_stages_than_blocks, folder_of("sd3")):
        assert "pipefusion_parallel_degree=4 is more than the 3 blocks" in message


def fails_then_works(path):
    """Raise in a callback on all ranks, with messages of other patches in flight; then generate another image."""
    parallel = running.wrap(running.loaded(path), degrees(2, 4, 1))

    def fail(*_):
        raise RuntimeError("in step 1")

    hook = parallel.transformer.register_forward_pre_hook(
        lambda *_: fail() if parallel.scheduler._call.step == 2 else None
    )
    with pytest.raises(RuntimeError, match="in step 1"):
        parallel(**call_of("sd3"), generator=running.seeded())
    hook.remove()
    channels = [channel._group for channel in parallel._pipefusion._channels.values()]
    abort = mock.patch.object(c10d, "_abort_process_group", wraps=c10d._abort_process_group)
    with abort as aborted, mock.patch.object(torch.distributed, "get_backend", lambda group: "nccl"):
        picture = running.array(parallel(**call_of("sd3"), generator=running.seeded()))
    assert [call.args[0] for call in aborted.mock_calls] == channels  # as NCCL's could not be destroyed
    with abort as aborted:
        parallel.unwrap()
    assert not aborted.called
    return picture


def test_a_failed_call_does_not_poison_the_next(pool, folder_of):
    path = folder_of("sd3", True)
    expected = displaced(path, call_of("sd3"), 4, 1)
    for picture in pool.run(2, fails_then_works, path):
        assert running.error(picture, expected) <= running.TOLERANCE


def in_bfloat16(path, asked):
    pipe = running.loaded(path, torch.bfloat16)
    parallel = running.wrap(pipe, asked)
    picture = running.array(parallel(**call_of("sd3"), generator=running.seeded()))
    parallel.unwrap()
    return picture


def test_stages_agree_in_bfloat16(pool, folder_of):
    (expected,) = pool.run(1, in_bfloat16, folder_of("sd3", True), degrees(1, 3, 1))
    for picture in pool.run(2, in_bfloat16, folder_of("sd3", True), degrees(2, 3, 1)):
        assert np.array_equal(picture, expected)


def small_patches(path):
    """Kontext appends the tokens of an image to those of the latents; a modular pipeline does not pass their number."""
    pipe = assembled(diffusers.FluxKontextAutoBlocks(), running.loaded(path))
    parallel = running.wrap(pipe, degrees(1, 8, 1, ulysses_degree=2))
    try:
        with pytest.raises(ValueError) as error:
            parallel(**call_of("flux", image=parts.picture(), max_area=80 * 48, _auto_resize=False))
        return str(error.value)
    finally:
        parallel.unwrap()


def test_patches_that_pictures_made_seem_larger_are_refused(pool, folder_of):
    for message in pool.run(2, small_patches, folder_of("flux")):
        assert "patches of 1 tokens, beside those of pictures, on 2 ranks" in message


def test_branches_of_different_text_length(pool, folder_of):
    """The two calls of a step have different numbers of text tokens."""
    path, generator = folder_of("flux", True), running.seeded()
    call = call_of("flux", 1, true_cfg_scale=2.5)
    call["negative_prompt_embeds"] = torch.randn(1, 4, tiny.TEXT, generator=generator)
    call["negative_pooled_prompt_embeds"] = torch.randn(1, 8, generator=generator)
    expected = displaced(path, call, 3, 1)
    check(pool, 2, path, degrees(2, 3, 1), call, expected)
    check(pool, 4, path, degrees(2, 3, 1, use_cfg_parallel=True), call, expected)


def own_loop(path, asked):
    """A hand-written denoising loop that sets its schedule before it becomes parallel."""
    pipe = running.loaded(path)
    latents = torch.randn(1, 4, 10, 6, generator=running.seeded())
    text = torch.randn(1, 5, tiny.TEXT, generator=running.seeded())
    parallel = running.wrap(pipe, asked)
    pipe.scheduler.set_timesteps(STEPS)

    def loop():
        x = latents
        for t in pipe.scheduler.timesteps:
            noise = pipe.transformer(
                pipe.scheduler.scale_model_input(x, t), text, t[None], {"resolution": None, "aspect_ratio": None}
            )  # fmt: skip
            x = pipe.scheduler.step(noise[0].chunk(2, dim=1)[0], t, x)[0]
        return x.numpy()

    with torch.no_grad():
        if asked is None:
            return loop()
        with parallel.active():
            result = loop()
        pipe.scheduler.set_timesteps(STEPS)
        timesteps = pipe.scheduler.timesteps
        with pytest.raises(ValueError, match="fetch them after"), parallel.active():
            pipe.scheduler.step(torch.zeros_like(latents), timesteps[0], latents)
    parallel.unwrap()
    return result


def test_a_loop_of_ones_own(pool, folder_of):
    path = folder_of("pixart_sigma", True)
    expected = own_loop(path, None)
    for result in pool.run(2, own_loop, path, degrees(2, 3, STEPS)):
        assert running.error(result, expected) <= running.TOLERANCE


def two_wraps(first, second):
    """Blocks of a pipeline are restored even if groups have been created again for another pipeline."""
    one, two = running.loaded(first), running.loaded(second)
    before = running.fingerprint(one)
    divided = running.wrap(one, degrees(2, 2, 1, ulysses_degree=2))
    other = running.wrap(two, {"ulysses_degree": 4})
    divided.unwrap()
    other.unwrap()
    return before == running.fingerprint(one)


def test_unwrap_after_another_wrap(pool, folder_of):
    assert all(pool.run(4, two_wraps, folder_of("sd3"), folder_of("flux")))


def groups_after_failures(path):
    parallel = running.wrap(running.loaded(path), degrees(2, 3, 1))
    parallel(**call_of("sd3"))
    counts = []
    for _ in range(3):
        with pytest.raises(ValueError, match="rows of tokens"):
            parallel(**call_of("sd3", height=32))
        with pytest.raises(ZeroDivisionError):
            parallel(**call_of("sd3", callback_on_step_end=lambda pipe, step, t, values: step // 0))
        hook = parallel.transformer.register_forward_pre_hook(
            lambda *_: counts[99] if parallel.scheduler._call.step == 2 else None
        )
        with pytest.raises(IndexError):
            parallel(**call_of("sd3"))
        hook.remove()
        parallel(**call_of("sd3"))
        counts.append(len(torch.distributed.distributed_c10d._world.pg_map))
    parallel.unwrap()
    return counts


def test_failed_calls_leave_no_groups_behind(pool, folder_of):
    for counts in pool.run(2, groups_after_failures, folder_of("sd3")):
        assert counts[0] == counts[-1]


def perturbed(path):
    pipe = diffusers.PixArtSigmaPAGPipeline(**running.loaded(path).components, pag_applied_layers=["blocks.1"])
    parallel = running.wrap(pipe, degrees(2, 2, 1))
    try:
        with pytest.raises(ValueError) as error:
            parallel(**call_of("pixart_sigma", pag_scale=3.0))
        return str(error.value)
    finally:
        parallel.unwrap()


def test_perturbed_attention_is_refused(pool, folder_of):
    for message in pool.run(2, perturbed, folder_of("pixart_sigma")):
        assert "blocks that other stages hold" in message
