"""`xdit serve`: the unmodified OpenAI client gets the same images as one rank, and faults fail only their requests."""

import asyncio
import base64
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import imageio
import numpy as np
import openai
import pytest
import running
import torch
import whole
from PIL import Image

from xfuser.config import InputConfig
from xfuser.config.args import SHIPPED_PIPELINE
from xfuser.pipeline_io.media import png
from xfuser.serve import command, page, server as server_module
from xfuser.serve.app import create_app
from xfuser.serve.engine import Engine
from xfuser.serve.jobs import Failure, Job, calls_of
from xfuser.serve.server import ImageRequest, Server
from xfuser.testing import faults
from xfuser.testing.serving import PATIENCE, ROOT, Served, until

SIDE, STEPS = 128, 3
PROMPT = "a red circle above a blue square"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    flags = (
        "--model",
        faults.faulty_pipeline(str(folder)),
        "--ulysses_degree",
        2,
        "--hang_timeout",
        3,
        "--trust_remote_code",
    )
    server = Served(folder, *flags, "--max_queue", 12, "--max_batch", 4, "--height", SIDE, "--width", SIDE)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture
def client(served):
    served.ready()
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300)


def draw(client, prompt=PROMPT, steps=STEPS, **fields):
    own = {name: fields.pop(name) for name in ("seed", "negative_prompt", "retry") if name in fields}
    body = {"num_inference_steps": steps} | own
    answer = client.images.generate(prompt=prompt, extra_body=body, **fields)
    pictures = [pixels(base64.b64decode(one.b64_json)) for one in answer.data if one.b64_json]
    return pictures[0] if len(pictures) == 1 else pictures


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


@running.remembered
def serial(prompt=PROMPT, seed=0, steps=STEPS, side=SIDE, binning=True):
    """Return the image of the unwrapped pipeline for a single prompt."""
    pipe = running.loaded(SHIPPED_PIPELINE)
    given = {"height": side, "width": side, "num_inference_steps": steps, "guidance_scale": 3.5}
    given["use_resolution_binning"] = binning
    made = pipe(prompt, **given, generator=torch.Generator().manual_seed(seed), max_sequence_length=256)
    return np.asarray(made.images[0], dtype=np.int16)


def same(drawn, expected):
    return drawn.shape == expected.shape and int(np.abs(drawn - expected).max()) <= 1  # rounding to 8 bits


def in_thread(function, *args, **kwargs):
    """Start a call in a thread, and return its future."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args, **kwargs)
    pool.shutdown(wait=False)
    return future


def drawing(client):
    """Request a slow image, wait for its first step, and return the event stream; closing the stream cancels it."""
    events = client.images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": faults.SLOW})
    next(event for event in events if event.step > 0)
    return events


def test_the_openai_client_draws_what_one_rank_draws(served, client):
    first, second = draw(client, seed=3, n=2)
    assert same(first, serial(seed=3)) and same(second, serial(seed=4))
    (answer,) = client.images.generate(
        prompt=PROMPT, response_format="url", size="64x64", extra_body={"seed": 3, "num_inference_steps": STEPS}
    ).data
    path = served.log.parent / "results" / answer.url.rsplit("/", 1)[1]
    assert same(pixels(path.read_bytes()), serial(seed=3, side=64))
    assert [model.id for model in client.models.list()] == ["faulty"]


@pytest.mark.parametrize(
    "fields, param, told",
    [
        ({"size": "100x64"}, "size", "multiples of 16"),
        ({"size": "4096x64"}, "size", "to 2048"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"style": "vivid"}, "style", "allowed are prompt"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"model": "dall-e-3"}, "model", "'faulty'"),
    ],
)
def test_errors_say_what_is_allowed(served, client, fields, param, told):
    counted = 'xdit_failures_total{code="%s"}' % ("model_not_found" if param == "model" else "invalid_value")
    before = served.metric(counted)
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as error:
        draw(client, **{"prompt": PROMPT} | fields)
    assert served.metric(counted) == before + 1
    assert error.value.body["param"] == param and told in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"


def test_paths_without_a_route_are_refused_alike(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.get("/nosuch", cast_to=object)
    assert error.value.body["type"] == "invalid_request_error" and error.value.body["message"] == "Not Found"


@pytest.mark.matrix
def test_jobs_of_a_batch_that_the_pipeline_refuses_are_drawn_alone(served, client):
    """One bad request must not fail the others."""
    ranks = served.ranks()
    assert len(draw(client, steps=faults.REFUSES_BATCHES, n=3, size="64x64")) == 3 and served.ranks() == ranks


@pytest.mark.matrix
def test_pictures_are_checked_before_they_are_accepted(client):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for data, told in [(b"no picture", "not an image"), (file.getvalue(), "takes no image")]:
        with pytest.raises(openai.BadRequestError, match=told):
            client.images.edit(image=("a.png", io.BytesIO(data), "image/png"), prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="image: List should have at most 1 item"):
        client.images.edit(image=[("a.png", file.getvalue()), ("b.png", file.getvalue())], prompt=PROMPT)


@pytest.mark.matrix
def test_pictures_of_a_batch_are_those_drawn_alone(served, client):
    """The same holds for successive requests: no state of one request affects another."""
    blocking = drawing(client)
    calls, before = served.metric("xdit_batch_size_count"), served.metric("xdit_batch_size_sum")
    prompts = [PROMPT, "a green square", "a blue circle", PROMPT]
    others = [in_thread(draw, client, prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    until(lambda: served.health()["queue"] == 4, "four waiting images")
    blocking.close()
    for seed, (prompt, other) in enumerate(zip(prompts, others, strict=True)):
        assert same(other.result(), serial(prompt, seed))
    assert served.metric("xdit_batch_size_count") - calls == 1 and served.metric("xdit_batch_size_sum") - before == 4
    first, _, again = (draw(client, prompt, seed=3) for prompt in (PROMPT, "a green square", PROMPT))
    assert np.array_equal(first, again)


@pytest.mark.matrix
def test_events_tell_steps_and_show_previews(client):
    options = {"stream": True, "partial_images": 2, "extra_body": {"num_inference_steps": 6, "seed": 3}}
    events = list(client.images.generate(prompt=PROMPT, **options))
    kinds = [event.type.split(".")[1] for event in events]
    assert kinds[-1] == "completed" and 1 <= kinds.count("partial_image") <= 2
    steps = [event.step for event in events if event.type == "image_generation.progress"]
    assert steps == sorted(steps) and steps[-1] == 6
    assert same(pixels(base64.b64decode(events[-1].b64_json)), serial(seed=3, steps=6))
    preview = next(event for event in events if event.type == "image_generation.partial_image")
    assert pixels(base64.b64decode(preview.b64_json)).shape == (SIDE // 2, SIDE // 2, 3) or SIDE // 8 < 32
    events = client.images.generate(
        prompt=PROMPT, n=2, stream=True, extra_body={"num_inference_steps": STEPS, "seed": 3}
    )
    completed = [event.b64_json for event in events if event.type == "image_generation.completed"]
    for seed, data in enumerate(completed, 3):
        assert same(pixels(base64.b64decode(data)), serial(seed=seed))
    assert len(completed) == 2


@pytest.mark.matrix
@pytest.mark.parametrize("by", ["delete", "disconnect"])
def test_a_cancelled_request_ends_within_a_step(served, client, by):
    events = drawing(client)
    name = next(events).id
    before = served.metric("xdit_steps_total")
    if by == "delete":
        client.delete(f"/images/generations/{name}", cast_to=object)
        with pytest.raises(openai.APIError, match="cancelled"):
            list(events)
    else:
        events.close()
    assert same(draw(client, seed=5), serial(seed=5))
    assert served.metric("xdit_steps_total") - before < faults.SLOW / 2 + STEPS  # a busy machine reports late
    assert served.metric("xdit_restarts_total") == 0


@pytest.mark.matrix
def test_a_cancelled_request_leaves_the_others_of_its_call(served, client):
    blocking, before = drawing(client), served.metric("xdit_batch_size_count")
    kept = in_thread(draw, client, steps=faults.SLOW, seed=1)
    left = client.images.generate(
        prompt=PROMPT, stream=True, extra_body={"num_inference_steps": faults.SLOW, "seed": 2}
    )
    until(lambda: served.health()["queue"] == 2, "two waiting images")
    blocking.close()
    next(event for event in left if event.step > 0)
    left.close()
    assert same(kept.result(), serial(seed=1, steps=faults.SLOW))
    assert served.metric("xdit_batch_size_count") - before == 1


@pytest.mark.matrix
def test_a_full_queue_says_when_to_come_again(served, client):
    blocking = drawing(client)
    waiting = in_thread(draw, client, n=10)
    until(lambda: served.health()["queue"] == 10, "ten waiting images")
    with pytest.raises(openai.RateLimitError) as error:
        draw(client, n=3)
    assert error.value.response.headers["retry-after"] and error.value.body["code"] == "rate_limit_exceeded"
    blocking.close()
    assert len(waiting.result()) == 10


@pytest.mark.matrix
def test_an_exception_fails_its_batch_alone(served, client):
    ranks = served.ranks()
    with pytest.raises(openai.InternalServerError, match="a fault was asked for") as error:
        draw(client, steps=faults.RAISES)
    assert error.value.body["code"] == "pipeline_failed"
    assert same(draw(client, seed=5), serial(seed=5)) and served.ranks() == ranks


@pytest.mark.matrix
def test_out_of_memory_halves_a_batch_and_refuses_what_is_alone(served, client):
    ranks = served.ranks()
    assert len(draw(client, steps=faults.ONLY_ALONE, n=3, size="64x64")) == 3
    with pytest.raises(openai.BadRequestError, match="too large for the memory"):
        draw(client, steps=faults.NEVER_FITS)
    assert same(draw(client, seed=5), serial(seed=5)) and served.ranks() == ranks


@pytest.mark.matrix
def test_a_killed_rank_takes_its_call_and_nothing_else(served, client):
    """Other requests in the queue survive, and a request with ``retry`` in the killed call is repeated."""
    blocking = drawing(client)
    lost, again = (
        in_thread(draw, client, steps=faults.SLOW, seed=seed, size="64x64", retry=seed == 1) for seed in range(2)
    )
    until(lambda: served.health()["queue"] == 2, "two waiting images")
    queued = in_thread(draw, client, seed=5)
    until(lambda: served.health()["queue"] == 3, "three waiting images")
    blocking.close()
    until(lambda: served.health()["queue"] == 1, "two images in one batch")
    os.kill(served.ranks()[1], signal.SIGKILL)
    with pytest.raises(openai.APIStatusError) as error:
        lost.result()
    assert error.value.status_code == 503 and error.value.body["code"] == "engine_restarted"
    assert same(again.result(), serial(seed=1, steps=faults.SLOW, side=64))
    assert same(queued.result(), serial(seed=5))


@pytest.mark.matrix
@pytest.mark.parametrize("steps, status", [(faults.HANGS_ON_LAST_RANK, 503), (faults.RAISES_ON_LAST_RANK, 500)])
def test_ranks_that_wait_for_one_are_started_anew(served, client, steps, status):
    before = served.metric("xdit_restarts_total")
    with pytest.raises(openai.APIStatusError) as error:
        draw(client, steps=steps)
    assert error.value.status_code == status
    until(lambda: served.metric("xdit_restarts_total") > before, "a restart")
    served.ready()
    assert same(draw(client, seed=5), serial(seed=5))


def test_ctrl_c_ends_all(served, client):
    drawn = in_thread(list, drawing(client))
    assert served.interrupt() <= 5
    assert drawn.exception() and served.process.returncode == 0


@pytest.mark.matrix
def test_videos_are_jobs(tmp_path):
    """The video starts from an image; the file equals the result of the unwrapped pipeline."""
    size = ("--height", 160, "--width", 96, "--num_frames", 9, "--num_inference_steps", STEPS)
    served = Served(tmp_path, "--model", whole.save("ltx_i2v", tmp_path), *size).ready()
    try:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300)
        file = io.BytesIO()
        whole.picture(160, 96).save(file, "PNG")
        given = {"prompt": "a red circle", "input_reference": ("a.png", file.getvalue(), "image/png")}
        videos = [client.videos.create(**given, extra_body={"seed": seed}) for seed in (1, 2, 1)]
        until(lambda: client.videos.retrieve(videos[2].id).status == "completed", "the last video")
        first, second, third = (client.videos.download_content(video.id).content for video in videos)
        assert first == third != second
        (tmp_path / "first.mp4").write_bytes(first)
        assert imageio.get_reader(tmp_path / "first.mp4").count_frames() == 9
        assert client.videos.delete(videos[0].id).deleted
        with pytest.raises(openai.NotFoundError, match="there is no video"):
            client.videos.retrieve(videos[0].id)
        slow = client.videos.create(**given, extra_body={"num_inference_steps": 1000})
        until(lambda: client.videos.retrieve(slow.id).status == "in_progress", "a first step")
        client.videos.delete(slow.id)
        with pytest.raises(openai.BadRequestError, match="POST /v1/videos"):
            client.images.generate(prompt="a red circle")
        assert client.videos.create(**given, size="96x160").size == "96x160"
    finally:
        served.interrupt()


def job(name, most=4, **settings):
    return Job(name, "", 0, settings, most=most)


def test_no_shape_starves():
    """A job waits for no more batches than there are jobs before it, independent of later jobs."""
    waiting = [job(f"small {i}", height=64) for i in range(6)] + [job("large", height=512)]
    batches = 0
    while True:
        call = calls_of(waiting)[0]
        waiting = [one for one in waiting if one not in call]
        if call[0].prompt == "large":
            break
        batches += 1
        waiting += [job("late", height=64) for _ in range(8)]
    assert batches == 2


def test_what_a_batch_has_in_common():
    guided = Job("c", "a cat", 0, {"height": 64}, most=4)
    pictured = Job("d", "", 0, {"height": 64}, most=4, image=b"")
    jobs = [job("a", height=64), job("b", height=80), guided, pictured, job("e", height=64), job("f", 1, height=64)]
    assert [[one.prompt for one in call] for call in calls_of(jobs)] == [["a", "e"], ["b"], ["c"], ["d"], ["f"]]
    assert [[one.prompt for one in call] for call in calls_of(jobs, parts=2)][:3] == [["a"], ["b"], ["c"]]
    assert [[one.prompt for one in call] for call in calls_of(jobs[1:])] == [["b"], ["c"], ["d"], ["e"], ["f"]]


def server_of(*flags):
    """Return a server that does not run: it starts no ranks."""
    args, options = command.parsed([*flags])
    return Server(args, options)


def test_unknown_words_and_videos_are_refused():
    server = server_of()
    abilities = {"pipeline": "PixArtSigmaPipeline", "videos": False, "pictures": False, "multiple": 16}
    server.engine.abilities = abilities
    for fields, told in [
        ({"prompt": "a red dragon"}, "'dragon'"),
        ({"prompt": PROMPT, "model": "other"}, "shapes-256"),
    ]:
        with pytest.raises(Failure, match=told):
            server.jobs_of(ImageRequest(**fields))
    jobs = server.jobs_of(ImageRequest(prompt=PROMPT, seed=7, n=3))
    assert [one.seed for one in jobs] == [7, 8, 9]
    server.engine.abilities = abilities | {"videos": True}
    with pytest.raises(Failure, match="POST /v1/videos"):
        server.jobs_of(ImageRequest(prompt=PROMPT))


async def asked(app, method, path, body=b"", kind="application/json"):
    """Return the response's messages to a client that disconnects right after its request."""
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": method, "path": path, "query_string": b""}
    scope |= {"headers": [(b"content-type", kind.encode())], "server": ("localhost", 80), "scheme": "http"}
    received, sent = [{"type": "http.request", "body": body}], []

    async def receive():
        return received.pop() if received else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    await asyncio.sleep(0.01)
    return sent


@pytest.fixture
def accepting(tmp_path):
    """A server that accepts requests, but has no engine that runs them."""
    server = server_of("--output_dir", str(tmp_path))
    server.engine.abilities = {"pipeline": "PixArtSigmaPipeline", "videos": False, "pictures": False, "multiple": 16}
    server.engine.why = ""
    return server


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_before_the_answer_began_is_drawn_nothing(accepting, stream):
    body = json.dumps({"prompt": PROMPT, "stream": stream}).encode()
    asyncio.run(asked(create_app(accepting, alone=False), "POST", "/v1/images/generations", body))
    assert not accepting.engine.waiting


def test_a_request_is_ended_by_its_id_also_behind_its_first_image(accepting):
    async def ended():
        jobs = await accepting.submit(ImageRequest(prompt=PROMPT, n=2))
        jobs[0].finish(b"")
        await asked(create_app(accepting, alone=False), "DELETE", f"/v1/images/generations/{jobs[0].id}")
        return jobs

    assert asyncio.run(ended())[1].failure.code == "cancelled"


@pytest.mark.parametrize(
    "kind, sent", [("multipart/form-data; boundary=x", b"--y"), ("application/json", b"[" * 100_000)]
)
def test_a_body_that_cannot_be_read_is_told_as_all_errors_are(accepting, kind, sent):
    app = create_app(accepting, alone=False)
    start, body = asyncio.run(asked(app, "POST", "/v1/images/edits", sent, kind))
    assert start["status"] == 400 and "message" in json.loads(body["body"])["error"]


def test_a_file_that_was_removed_by_others_fails_no_request(accepting, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "KEPT_FILES", 1)
    names = []
    for name in "abc":
        made = job(name)
        made.finish(name.encode())
        names.append(accepting.entry(made, "url", "http://x/")["url"].rsplit("/", 1)[1])
        if name == "a":
            (tmp_path / names[0]).unlink()
    assert [file.name for file in tmp_path.iterdir()] == names[2:]


def test_the_page_keeps_no_job_that_has_ended(accepting):
    draw = next(one.fn for one in page.page(accepting).fns.values() if one.name == "draw")

    async def drawn():
        events = draw(PROMPT, "", "auto", 3, "", None, Namespace(session_hash="a"))
        first = asyncio.ensure_future(anext(events))
        await asyncio.to_thread(until, lambda: accepting.engine.waiting, "a waiting job")
        job = weakref.ref(accepting.engine.waiting[0])
        job().finish(png(Image.new("RGB", (8, 8))))
        assert (await first)[0].startswith("<progress") and [event[0][:5] async for event in events] == ["done,"]
        return job

    job = asyncio.run(drawn())
    gc.collect()
    assert job() is None


def test_nothing_waits_for_an_engine_that_has_ended():
    engine = Engine(lambda connections: None, [1], InputConfig(), Namespace(max_queue=1, hang_timeout=1))
    asyncio.run(engine.run())
    with pytest.raises(Failure, match="a rank ended") as error:
        engine.submit([job("a")])
    assert error.value.status == 503


def test_a_queue_holds_so_many():
    engine = server_of("--max_queue", "10").engine
    engine.submit([job("a")] * 6)
    with pytest.raises(Failure, match="10 may"):
        engine.submit([job("a")] * 6)


def test_a_rank_that_reads_nothing_is_started_anew(pool):
    """A stopped rank does not read, so its connection accepts no message; this must not block the server.

    Other child processes are left alone.
    """
    before = pool.run(1, os.getpid)

    def launch(connections):
        with Connection(os.dup(connections[0].fileno())) as rank:
            rank.send(("ready", {"multiple": 16}))
            until(lambda: not engine.why, "an engine that is ready")
            until(lambda: engine.why, "an engine that restarts its ranks")

    async def drawn(job):
        running = asyncio.create_task(engine.run())
        while engine.why:
            await asyncio.sleep(0.05)
        engine.submit([job])
        await asyncio.wait_for(job.ended(), 10)
        running.cancel()
        await asyncio.wait([running])

    engine = Engine(launch, [1], InputConfig(), Namespace(max_queue=1, hang_timeout=0.5))
    edited = Job("a", "", 0, {"num_inference_steps": 1}, image=bytes(1 << 22))
    asyncio.run(drawn(edited))
    assert edited.failure.status == 503 and "no step for 0.5 s" in str(edited.failure)
    assert pool.run(1, os.getpid) == before


def test_a_pipeline_that_returns_another_number_of_images_ends_no_server():
    """Requests that the pipeline does not support as a batch run one by one."""
    stopped, counts = threading.Event(), []

    def launch(connections):
        with Connection(os.dup(connections[0].fileno())) as rank:
            if not stopped.is_set():
                rank.send(("ready", {"multiple": 16}))
            while not stopped.is_set():
                if rank.poll(0.05):
                    _, _, told = rank.recv()
                    counts.append(len(told))
                    rank.send(("end", ("done", [b"one"] * (told[0]["prompt"] != "none"))))

    async def drawn(jobs):
        running = asyncio.create_task(engine.run())
        while engine.why:
            await asyncio.sleep(0.05)
        engine.submit(jobs)
        for one in jobs:
            await asyncio.wait_for(one.ended(), 10)
        stopped.set()
        await running

    engine = Engine(launch, [1], InputConfig(), Namespace(max_queue=3, hang_timeout=5))
    jobs = [job("a"), job("b"), job("none", 1)]
    asyncio.run(drawn(jobs))
    assert sorted(counts) == [1, 1, 1, 2] and [one.outcome for one in jobs[:2]] == [b"one"] * 2
    assert jobs[2].failure.status == 500 and "0 results instead of 1" in str(jobs[2].failure)


def test_what_takes_too_much_memory_is_refused():
    """The planner's count for the size decides before the request is accepted; the engine need not run."""
    server = server_of("--memory", "100MB", "--ulysses_degree", "2", "--no_use_resolution_binning")
    sizes = [{"height": side, "width": side, "num_frames": None, "num_inference_steps": 1} for side in (256, 1024)]
    server.ranks_for(sizes[0])
    with pytest.raises(Failure, match=r"takes 0\.\d+ GB of a rank, which has 0\.1 GB"):
        server.ranks_for(sizes[1])


def test_what_cannot_be_served_is_told_in_one_line(tmp_path, monkeypatch):
    with command.listening("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="choose another --port"):
        command.listening("127.0.0.1", taken.getsockname()[1])
    for flags, told in [
        (["--max_batch", "0"], "max_batch=0"),
        (["--no_such_flag", "2"], "--help"),
        (["--model", str(tmp_path / "no")], "does not exist"),
    ]:
        with pytest.raises(ValueError, match=told):
            command.main(flags)
    monkeypatch.setattr(command, "PACKAGES", ("fastapi", "no_such_package"))
    with pytest.raises(ValueError, match=r"requires no_such_package: pip install 'xfuser\[serve\]'"):
        command.main([])
    told = [sys.executable, "-m", "xfuser.cli", "serve", "--port", "-1"]
    done = subprocess.run(told, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.matrix
def test_a_server_whose_ranks_do_not_start_ends(tmp_path, monkeypatch, request):
    """It also leaves no processes of its launcher."""
    model, folder = tmp_path / "damaged", tempfile.TemporaryDirectory()  # a short path, as it holds sockets
    request.addfinalizer(folder.cleanup)
    monkeypatch.setenv("TMPDIR", folder.name)
    shutil.copytree(SHIPPED_PIPELINE, model)
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    served = Served(tmp_path, "--model", model)
    assert served.process.wait(PATIENCE) == 1 and "scheduler" in served.log.read_text()
    assert not [name for name in os.listdir(folder.name) if name.startswith(("torchelastic_", "tmp"))]
