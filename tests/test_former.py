"""What version 0.1 had still works: import paths, and a run directory that it left unfinished."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import east_plugins
from east_plugins.__main__ import main

RUN = Path(__file__).parent / "fixtures" / "run-0.1"  # interrupted in epoch 5 of 8 by Ctrl-C
NAMES = {
    "activations": ("PhaseOut", "attach", "factory"),
    "activations.phased": ("PhaseOut",),
    "dct": ("convert", "materialize"),
    "export": ("to_c",),
    "registry": ("growth",),
    "rules.growth": ("gradient",),
    "schedules.density": ("Cyclic",),
    "sharing": ("share",),
    "sparse": ("Engine",),
}


@pytest.mark.parametrize("module", NAMES)
def test_import_paths(module):
    code = f"import warnings; warnings.simplefilter('error'); from east_plugins.{module} import {NAMES[module][0]}"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.splitlines()
    still = module in ("export", "sparse")
    assert (not lines) if still else ("DeprecationWarning" in lines[-1] and "now" in lines[-1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_former_module_is_the_present_one():
    for module, names in NAMES.items():
        former = importlib.import_module(f"east_plugins.{module}")
        for name in names:
            assert getattr(former, name) is getattr(sys.modules[former.__name__], name)
    assert importlib.import_module("east_plugins.schedules.density").Cyclic is east_plugins.Cyclic


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("east_plugins.schedules.nothing")


@pytest.mark.parametrize("statement", ["from east_plugins import launch as east", "import east_plugins.upstream"])
def test_what_patched_forks_import_says_nothing(statement):
    result = subprocess.run([sys.executable, "-W", "error", "-c", statement], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_run_directory_resumes_exports_and_analyzes(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    assert main(["train", "--config", str(run / "config.yaml"), "--resume", "--out", str(run), "--quiet"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["nonzeros"], summary["steps"], summary["method"]) == (431, 40, "east+connected")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 8
    assert main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "net.safetensors")]) == 0
    assert main(["analyze", str(run), "--images", "16"]) == 0
    assert "431" in capsys.readouterr().out
