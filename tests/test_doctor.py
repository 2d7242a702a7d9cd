"""The output of ``xdit doctor``, on this machine and with (fake) GPUs."""

import sys

import accelerator
import pytest

from xfuser.cli import doctor, main as cli
from xfuser.testing.gpu import ranks


def test_it_says_what_is_here_and_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xdit", "doctor", "--no_test"])
    assert cli.main() == 0
    told = capsys.readouterr().out
    assert "- device cpu, messages by gloo" in told and "flash, math" in told
    assert "- an accelerator: " in told and "- flash-attn: " in told and "- diffusers " in told


@pytest.mark.parametrize(("error", "agree"), [(0.0, True), (1.0, False)])
def test_two_ranks_agree_or_the_exit_code_says_so(pool, monkeypatch, capsys, error, agree):
    found = ranks.matrix.error
    monkeypatch.setattr(ranks.Pools, "of", lambda self, own: pool)
    monkeypatch.setattr(ranks.matrix, "error", lambda *both: found(*both) + error)
    assert doctor.main([]) == int(not agree)
    assert ("two ranks (one cpu, gloo) draw what one draws" if agree else "**error 1e+00**") in capsys.readouterr().out


def test_unknown_flags_are_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xdit", "doctor", "--fast"])
    assert cli.main() == 1
    assert capsys.readouterr().err.startswith("xdit: ValueError: xdit doctor: unrecognized arguments: --fast")


def test_it_says_what_gpus_there_are(monkeypatch, tmp_path):
    accelerator.install(monkeypatch, count=2)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho GPU0 GPU1 NV18")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert f"- 2 x {accelerator.NAME}, 2 GB each" in "\n".join(f"- {line}" for line in doctor.here())
    assert any("messages by nccl, dtype torch.bfloat16" in line for line in doctor.used())
    assert not any("accelerator" in line for line in doctor.missing())
    assert doctor.topology() == "GPU0 GPU1 NV18"
