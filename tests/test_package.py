"""The package as a whole: imports, floors, and the README's statements."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.fsdp import fully_shard

import xfuser
from xfuser.models.registry import PLANS
from xfuser.testing import matrix

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "xfuser").rglob("*.py"))
LOW = {"call", "core", "models", "vae", "config", "methods", "weights", "pipeline_io"}
ENGINE = LOW | {"parallel"}
FLOORS = {  # every name at the top of the package, and its allowed imports of others
    "core": set(),
    "models": set(),
    "vae": {"core"},
    "config": {"core", "models", "vae"},
    "call": {"core"},
    "methods": {"call", "config", "core", "models", "vae"},
    "weights": {"core", "models", "config", "methods"},
    "pipeline_io": {"core", "config"},
    "parallel": LOW,
    "pipelines": ENGINE,
    "compat": ENGINE | {"pipelines"},
    "planner": ENGINE,
    "testing": ENGINE | {"__init__"},
    "bench": ENGINE | {"testing", "cli", "planner", "serve"},
    "cli": ENGINE | {"planner", "testing"},
    "serve": ENGINE | {"cli", "planner"},
    "__init__": ENGINE | {"testing"},
    "logger": {"core"},
    "legacy": {"compat"},
    "model_executor": {"compat"},
}
OLD_PATHS = ("xfuser/core/long_ctx_attention/",)  # import paths of the older engine, which import from compat


def test_public_names_are_there():
    for name in xfuser.__all__:
        assert getattr(xfuser, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xfuser.nothing
    assert importlib.import_module("xfuser.parallel").xDiTParallel is xfuser.xDiTParallel


def test_the_torch_that_is_required_has_what_is_called():
    """2.7 is the first release with ``fully_shard(ignored_params=...)``."""
    assert "ignored_params" in inspect.signature(fully_shard).parameters
    assert '"torch>=2.7"' in (ROOT / "setup.py").read_text()


def test_import_is_light():
    """The import loads neither Diffusers nor an optional package, and creates no process group."""
    code = (
        "import sys, xfuser, torch.distributed as dist; from xfuser.core.distributed import get_sp_group\n"
        "heavy = ('diffusers', 'transformers', 'flash_attn', 'yunchang')\n"
        "print([name for name in heavy if name in sys.modules], dist.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False", done.stderr


def part_of(path):
    return path.relative_to(ROOT / "xfuser").parts[0].removesuffix(".py")


def imported_parts(path):
    """Return the top-level names of the package from which a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "xfuser":
            yield from (alias.name if (ROOT / "xfuser" / alias.name).is_dir() else "__init__" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xfuser."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1] for name in node.names if name.name.startswith("xfuser."))


def test_every_part_has_its_floor():
    assert {part_of(path) for path in SOURCES} == FLOORS.keys()


@pytest.mark.parametrize("part", FLOORS)
def test_lower_floors_import_no_higher_ones(part):
    for path in SOURCES:
        if part_of(path) == part and not str(path.relative_to(ROOT)).startswith(OLD_PATHS):
            higher = set(imported_parts(path)) - FLOORS[part] - {part}
            assert not higher, f"{path} imports from {higher}"


def test_old_import_paths_are_nothing_but_imports():
    """They are thin re-exports: a docstring, one import from compat, and the imported names."""
    olds = [path for path in SOURCES if str(path.relative_to(ROOT)).startswith(OLD_PATHS)]
    olds += [path for path in SOURCES if part_of(path) in ("logger", "legacy", "model_executor")]
    for path in olds:
        kinds = {type(node) for node in ast.parse(path.read_text()).body}
        assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, path


def test_no_line_names_a_device():
    """Device types come from xfuser/core/device.py, which gets them from torch."""
    for path in SOURCES:
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not [text for text in strings if isinstance(text, str) and text.startswith("cuda")], path


def test_tables_of_models_are_those_of_the_registry():
    assert "\n".join(matrix.support()) in (ROOT / "README.md").read_text()
    assert "\n".join(matrix.refusals()) in (ROOT / "docs" / "models.md").read_text()
    assert "\n".join(matrix.reasons()) in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("part", ["core", "methods"])
def test_the_engine_has_no_branch_on_a_class(part):
    """The engine knows models only by their plans."""
    for path in SOURCES:
        if path.relative_to(ROOT / "xfuser").parts[0] == part:
            assert not [name for name in PLANS if name in path.read_text()], path
