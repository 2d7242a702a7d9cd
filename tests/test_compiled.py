"""Compiled blocks: images are right under every method, graphs are counted, and unwrap() restores the pipeline."""

from dataclasses import replace

import pytest
import running
import tiny
import torch
import torch._inductor.config
from diffusers import DiffusionPipeline
from torch._dynamo.utils import counters
from torch._inductor.utils import get_first_incompatible_cudagraph_node

from xfuser import parallelize, xDiTParallel, xFuserArgs
from xfuser.core.attention import operator
from xfuser.models.registry import PLANS, plan_of
from xfuser.testing import matrix
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

PIPED = {"pipefusion_parallel_degree": 2, "warmup_steps": 3}  # exact in warm-up steps
METHODS = {
    "ulysses": {"ulysses_degree": 2},
    "cfg": {"use_cfg_parallel": True},
    "dp": {"data_parallel_degree": 2},
    "tensor": {"tensor_parallel_degree": 2},
    "pipefusion": PIPED,
    "shares": {"ulysses_degree": 2, "fully_shard_degree": 2},
}


def whole(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def in_place(pipe):
    pipe.transformer.compile(backend="eager")


def blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


def replaced_blocks(pipe):
    blocks = pipe.transformer.transformer_blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")


WAYS = (whole, in_place, blocks, replaced_blocks)


def compiled_parts(pipe):
    """Return the class and the compiled call of each module."""
    return [(type(one).__name__, vars(one).get("_compiled_call_impl")) for one in pipe.transformer.modules()]


def fresh(path):
    torch._dynamo.reset()
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(path, degrees, call, way):
    """Return an image of a pipeline compiled and called before the wrap, and whether unwrap() leaves it compiled."""
    pipe = fresh(path)
    way(pipe)
    pipe(**call, generator=running.seeded())  # compiles code without hooks
    given, before = pipe.transformer, compiled_parts(pipe)
    parallel = running.wrap(pipe, degrees)
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return picture, pipe.transformer is given and compiled_parts(pipe) == before


@pytest.mark.parametrize(("family", "method"), [*(("sd3", one) for one in METHODS), ("flux", "pipefusion")])
def test_a_compiled_transformer_is_parallel(pool, folder_of, family, method):
    path, call = folder_of(family), tiny.call_of(family, 2)
    for picture, as_before in pool.run(2, draw, path, METHODS[method], call, whole):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE and as_before


@pytest.mark.parametrize(
    ("way", "method"),
    [
        (in_place, "ulysses"),
        (in_place, "tensor"),
        (blocks, "pipefusion"),
        (replaced_blocks, "tensor"),
        (replaced_blocks, "pipefusion"),
    ],
)
def test_modules_that_are_compiled_in_place_or_within(pool, folder_of, way, method):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    for picture, as_before in pool.run(2, draw, path, METHODS[method], call, way):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE and as_before


def compiled_late(path, call):
    """Compile through the wrapper; return images of its calls, and of a loop that calls the compiled model directly."""
    pipe = fresh(path)
    parallel = running.wrap(pipe, {"ulysses_degree": 2})
    plain = pipe.transformer
    whole(parallel)
    given = parallel.transformer
    picture = running.array(parallel(**call, generator=running.seeded()))
    assert parallel.transformer is given is not plain
    torch.manual_seed(0)
    inputs = torch.randn(1, 16, 10, 6), torch.randn(1, 5, 16), torch.randn(1, 16), torch.zeros(1)
    with torch.no_grad():
        expected = plain(*inputs, return_dict=False)[0]
        seen = []
        feed_forward = plain.transformer_blocks[0].ff
        handle = feed_forward.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        with parallel.active():
            ours = given(*inputs, return_dict=False)[0]
        handle.remove()
    parallel.unwrap()
    return picture, running.error(ours.numpy(), expected.numpy()), seen


def test_what_is_compiled_behind_the_wrap_is_parallel_too(pool, folder_of):
    path, call = folder_of("sd3"), tiny.call_of("sd3")
    for picture, difference, seen in pool.run(2, compiled_late, path, call):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE
        assert difference <= running.TOLERANCE and seen[0] in (7, 8)  # shards of 15 tokens


def compiled_anew(path, call):
    """Replace a compiled transformer after a call; return an image, and the number of graphs that run it."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    pipe = fresh(path)
    whole(pipe)
    parallel = running.wrap(pipe, {"ulysses_degree": 2})
    parallel(**call, generator=running.seeded())
    torch.manual_seed(9)
    parallel.transformer = torch.compile(tiny.sd3_transformer(), backend=counted)
    picture = running.array(parallel(**call, generator=running.seeded()))
    parallel.unwrap()
    return picture, len(graphs)


def test_a_compiled_transformer_that_replaces_another_runs_compiled(pool, folder_of):
    path, call = folder_of("sd3"), tiny.call_of("sd3")
    pipe = fresh(path)
    torch.manual_seed(9)
    pipe.transformer = tiny.sd3_transformer()
    expected = running.array(pipe(**call, generator=running.seeded()))
    for picture, graphs in pool.run(2, compiled_anew, path, call):
        assert running.error(picture, expected) <= running.TOLERANCE and graphs


def bare_loop(family):
    """Call parallelize() on a compiled transformer; its plan is that of the model's class, not of the compiler's."""
    torch.manual_seed(0)
    model = FAMILIES[family].build()
    register = plan_of(model)
    compiled = torch.compile(model, backend="eager")
    parallel = parallelize(compiled, register, xFuserArgs(ulysses_degree=2).create_config()[0])
    inputs = FAMILIES[family].conditions(model, 2, torch.randn)
    latents, steps = torch.randn(2, 4, 10, 6), torch.tensor([5, 5])
    with torch.no_grad():
        expected = model(latents, timestep=steps, **inputs, return_dict=False)[0]
        with parallel.active():
            ours = parallel.transformer(latents, timestep=steps, **inputs, return_dict=False)[0]
    return running.error(ours.numpy(), expected.numpy())


def test_a_compiled_transformer_in_a_loop(pool):
    for difference in pool.run(2, bare_loop, "pixart"):
        assert difference <= running.TOLERANCE


# The number of graphs is the same with any backend; "eager" only traces, "aot_eager" also decomposes the traced code to
# functional operators, and neither compiles C++.

COUNTED = ("flux", "pixart", "sd3", "wan", "qwen_image", "hunyuan_video", "ltx", "flux2", "z_image", "cogvideox")
UNLIKE = ("flux", "sd3", "wan")  # also under products of two methods, CFG and data parallelism
CELLS = [
    (family, method)
    for family in COUNTED
    for method, (ranks, _) in matrix.METHODS.items()
    if not matrix.refusal(family, method) and (family in UNLIKE or (ranks == 2 and method not in ("cfg2", "dp2")))
]
CELLS.remove(("z_image", "distrifusion2"))  # lists of latents have no oracle
COVERING = [("flux", "ulysses2 x ring2"), ("sd3", "cfg2"), ("wan", "pipefusion2 M=3"), ("ltx", "tensor2")]
GRAPHS = {
    "flux": 2,
    "flux2": 2,
    "hunyuan_video": 2,
    "sd3": 3,
    "wan_vace": 3,
}  # classes of blocks; SD3: with and without attn2, and the last one; Wan VACE: also the first block of the hints
CALL = {"num_inference_steps": 4, "images": 2}


def varied(name, changes):
    """Return a family of the zoo with a changed configuration or other latents."""
    family = FAMILIES[name]
    return replace(
        family, config=family.config | changes.get("config", {}), latents=changes.get("latents", family.latents)
    )


def compiled_loop(family, degrees, backend):
    """Return a wrapped loop whose transformer was compiled before the wrap."""
    torch._dynamo.reset()
    counters.clear()
    loop = loop_of(family)
    loop.transformer = torch.compile(loop.transformer, backend=backend)
    return xDiTParallel(loop, xFuserArgs(**degrees).create_config()[0])


def graphs_of(name, degrees, changes=({}, {}), backend="eager"):
    """Call the transformer of the first change once for each change; return latents, and graphs and breaks so far."""
    families = [varied(name, one) for one in changes]
    pipe = compiled_loop(families[0], degrees, backend)
    called = [(pipe(family, **CALL), counters["stats"]["unique_graphs"]) for family in families]
    return [(latents, graphs, sum(counters["graph_break"].values())) for latents, graphs in called]


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*cell, marks=pytest.mark.covering if cell in COVERING else pytest.mark.matrix) for cell in CELLS],
)
def test_a_block_is_one_graph_that_all_of_its_class_have(pool, family, method):
    ranks, degrees = matrix.METHODS[method]
    expected = matrix.reference(family, degrees, CALL)
    backend = "aot_eager" if (family, method) in COVERING else "eager"
    for (first, graphs, _), (second, later, breaks) in pool.run(ranks, graphs_of, family, degrees, ({}, {}), backend):
        assert graphs <= GRAPHS.get(family, 1) * (3 if "pipefusion" in method else 1) and not breaks
        assert later == graphs  # a second call compiles nothing
        for latents in (first, second):
            assert matrix.error(latents, expected) <= matrix.TOLERANCES.get(family, matrix.TOLERANCE)


OTHERS = [
    pytest.param(name, marks=pytest.mark.covering if name == "sana" else pytest.mark.matrix)
    for name, family in FAMILIES.items()
    if family.present and name not in COUNTED and PLANS[family.cls].blocks
]


def breaks_of(name, degrees):
    """Return latents, the number of graphs, and the reasons of graph breaks."""
    pipe = compiled_loop(FAMILIES[name], degrees, "eager")
    return pipe(FAMILIES[name], **CALL), counters["stats"]["unique_graphs"], set(counters["graph_break"])


@pytest.mark.parametrize("family", OTHERS)
def test_further_classes_break_no_graph_that_is_whole_without_a_wrap(pool, family):
    expected, known = matrix.reference(family, {}, CALL), set()
    if FAMILIES[family].cls in matrix.BREAKING:
        ((_, _, known),) = pool.run(1, breaks_of, family, {})
        assert known
    degrees = {"use_cfg_parallel": True} if matrix.refusal(family, "ulysses2") else {"ulysses_degree": 2}
    for latents, graphs, breaks in pool.run(2, breaks_of, family, degrees):
        assert matrix.error(latents, expected) <= matrix.TOLERANCES.get(family, matrix.TOLERANCE)
        assert breaks <= known and (known or graphs <= GRAPHS.get(family, 2))


def test_graphs_do_not_depend_on_the_depth(pool):
    deep = {"config": {"num_layers": 10, "num_single_layers": 30}}
    for ((_, graphs, breaks),) in pool.run(2, graphs_of, "flux", {"ulysses_degree": 2}, (deep,)):
        assert graphs == 2 and not breaks


def graphs_by_text(path, degrees, calls):
    """Return an image for each length of the text, and the graphs and breaks after it."""
    pipe = fresh(path)
    counters.clear()
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    parallel, found = running.wrap(pipe, degrees), []
    for call in calls:
        picture = running.array(parallel(**call, generator=running.seeded()))
        found.append((picture, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    parallel.unwrap()
    return found


@pytest.mark.parametrize("method", ["ulysses", "tensor", "pipefusion", "shares"])
def test_one_more_graph_serves_all_further_lengths_of_the_text(pool, folder_of, method):
    path, calls = folder_of("flux"), [tiny.call_of("flux", 2, max_sequence_length=length) for length in (7, 5, 4, 6)]
    for found in pool.run(2, graphs_by_text, path, METHODS[method], calls):
        graphs = [counted for _, counted, _ in found]
        most = 3 if method == "pipefusion" else 2
        assert graphs[1] <= most * graphs[0] and graphs[1:] == [graphs[1]] * 3 and not found[-1][2], graphs
        for (picture, _, _), call in zip(found, calls, strict=True):
            assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE


@pytest.mark.parametrize("family", ["pixart", "wan"])
def test_one_more_graph_serves_all_further_resolutions(pool, family):
    sized = [{"latents": (*FAMILIES[family].latents[:-2], rows, 6)} for rows in (10, 14, 8, 22)]
    for results in pool.run(2, graphs_of, family, {"ulysses_degree": 2}, sized):
        assert [graphs for _, graphs, _ in results] == [1, 2, 2, 2]


def test_inductor_draws_what_is_drawn_without_it(pool):
    expected = matrix.reference("pixart", {}, CALL)
    for ((latents, graphs, breaks),) in pool.run(2, graphs_of, "pixart", {"ulysses_degree": 2}, ({},), "inductor"):
        assert matrix.error(latents, expected) <= matrix.TOLERANCE and (graphs, breaks) == (1, 0)


def unlike(name):
    """Return the error of a compiled transformer that is not wrapped, while a wrapped one is active."""
    family = FAMILIES[name]
    wrapped, bare = compiled_loop(family, {"ulysses_degree": 2}, "aot_eager"), loop_of(family)
    before = bare(family, **CALL)
    bare.transformer.compile(backend="aot_eager")
    with wrapped.active():
        within = bare(family, **CALL)
    return matrix.error(within, before)


def test_models_that_are_not_wrapped_are_left_alone(pool):
    assert max(pool.run(2, unlike, "pixart")) <= matrix.TOLERANCE


def broken(name):
    """Run a call whose blocks fail to compile."""

    def fails(graph, inputs):
        raise RuntimeError("cannot compile this graph")

    family = FAMILIES[name]
    return compiled_loop(family, {"ulysses_degree": 2}, fails)(family, **CALL)


def test_blocks_that_cannot_be_compiled_run_eagerly(pool):
    expected = matrix.reference("pixart", {}, CALL)
    for latents in pool.run(2, broken, "pixart"):
        assert matrix.error(latents, expected) <= matrix.TOLERANCE


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this release of torch has no such tag")
def test_no_cuda_graph_records_what_differs_by_block_and_step():
    for one in (operator.attend, operator.run):
        graph = torch.fx.Graph()
        graph.output(graph.call_function(one))
        assert get_first_incompatible_cudagraph_node(torch.fx.GraphModule({}, graph)).target is one


def test_a_missing_compiler_is_told_ahead_of_all():
    nowhere = torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)})
    with nowhere, pytest.raises(ValueError, match="use_torch_compile: no C\\+\\+ compiler is found: install g"):
        xFuserArgs(use_torch_compile=True, model="shapes-256").checked(1)
