"""The package as a whole: imports, floors, and what the README says of it."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import xfuser
from xfuser.models.registry import PLANS
from xfuser.testing import matrix

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "xfuser").rglob("*.py"))
FLOORS = {  # each part and what it may import from the others
    "core": {"logger"},
    "models": set(),
    "config": {"core", "models", "vae"},
    "vae": {"core"},
    "methods": {"core", "models", "vae", "logger"},
    "model_executor": {"core"},
}


def test_public_names_are_there():
    for name in xfuser.__all__:
        assert getattr(xfuser, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xfuser.nothing
    assert importlib.import_module("xfuser.parallel").xDiTParallel is xfuser.xDiTParallel


def test_import_is_light():
    """Neither Diffusers nor an optional package is loaded, and no process group is made."""
    code = (
        "import sys, xfuser, torch.distributed as dist; from xfuser.core.distributed import get_sp_group\n"
        "heavy = ('diffusers', 'transformers', 'flash_attn', 'yunchang')\n"
        "print([name for name in heavy if name in sys.modules], dist.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[] False", done.stderr


@pytest.mark.parametrize("part", FLOORS)
def test_lower_floors_import_no_higher_ones(part):
    for path in SOURCES:
        if path.relative_to(ROOT / "xfuser").parts[0] != part:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xfuser."):
                imported = node.module.split(".")[1]
                assert imported == part or imported in FLOORS[part], f"{path} imports {node.module}"


def test_no_line_names_a_device():
    """Devices come from xfuser/core/device.py, which asks torch."""
    for path in SOURCES:
        strings = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert not [text for text in strings if isinstance(text, str) and text.startswith("cuda")], path


def test_tables_of_models_are_those_of_the_registry():
    assert "\n".join(matrix.support()) in (ROOT / "README.md").read_text()
    assert "\n".join(matrix.refusals()) in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.parametrize("part", ["core", "methods"])
def test_the_engine_has_no_branch_on_a_class(part):
    """What it knows of models are their plans."""
    for path in SOURCES:
        if path.relative_to(ROOT / "xfuser").parts[0] == part:
            assert not [name for name in PLANS if name in path.read_text()], path
