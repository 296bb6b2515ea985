"""The scripts in tests/examples run as they stand, from any folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from east_plugins.training.models import build

EXAMPLES = Path(__file__).parent / "examples"


def python(*words, cwd):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_rule_of_ones_own_grows_weights_that_never_fired(tmp_path):
    active, fired = map(int, re.findall(r"\d+", python(EXAMPLES / "own_rule.py", cwd=tmp_path)))
    assert active == round(0.05 * (64 * 128 + 128 * 10)) < fired


def test_the_rule_is_found_from_the_command_line_and_its_option_is_a_flag(tmp_path):
    shutil.copy(EXAMPLES / "own_rule.py", tmp_path)
    text = python("-m", "east_plugins", "train", "--growth", "own_rule:GradientToUnfired", "--help", cwd=tmp_path)
    assert "--growth-again X" in text
    assert "factor on weights that were active before (default: 0.1)" in " ".join(text.split())


def test_the_three_tricks_in_a_loop_end_at_the_target_without_dyrelu(tmp_path):
    printed = python(EXAMPLES / "three_tricks.py", cwd=tmp_path)
    lines = re.findall(r"step (\d+): (\d+) active weights, (\d+) parameters", printed)
    active, parameters = ({int(line[0]): int(line[i]) for line in lines} for i in (1, 2))
    assert active[6] == active[18] == 4 * active[40] and active[12] == active[24] == active[40]  # peaks, target
    assert parameters[18] > parameters[24] == parameters[40]


def test_a_mask_in_itops_manner_takes_cycles_and_dyrelu(tmp_path):
    found = python(EXAMPLES / "attached.py", cwd=tmp_path)
    weights = 8 * 3 * 9 + 8 * 8 * 9 + 4 * 32
    assert found.startswith(f"ITOP: {round(0.08 * weights)} active weights, finished: True\n")
    assert found.endswith("activations: ReLU, ReLU, Flatten\n")


def test_the_engine_computes_a_method_by_name(tmp_path):
    found = python(EXAMPLES / "sparse_engine.py", cwd=tmp_path)
    assert re.fullmatch(r"\d+ active weights, the engine is sparse\n", found)


def test_a_network_becomes_a_c_file_and_a_program_where_there_is_a_compiler(tmp_path):
    found = python(EXAMPLES / "export_to_c.py", tmp_path, cwd=tmp_path)
    assert re.match(r"digits\.c: static memory \d+ bytes", found)
    assert "void digits_run" in (tmp_path / "digits.c").read_text()
    classified = re.search(r"^class \d of 10, score \S+, label \d$", found, re.MULTILINE)
    assert bool(classified) == bool(shutil.which("cc")), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, package",
    [("in_lightning.py", "lightning"), ("in_huggingface.py", "transformers"), ("in_accelerate.py", "accelerate")],
)
def test_other_peoples_trainers_train_sparsely(script, package, tmp_path):
    pytest.importorskip(package)
    weights = sum(parameter.numel() for parameter in build("resnet20", 10).parameters() if parameter.dim() > 1)
    found = python(EXAMPLES / script, cwd=tmp_path)
    assert f"8 steps, {round(0.01 * weights)} active weights\n" in found


def test_a_dense_transformer_is_pruned_by_magnitude_and_fine_tuned(tmp_path):
    found = python(EXAMPLES / "fine_tuning.py", cwd=tmp_path)
    dense, pruned, tuned = (float(number) for number in re.findall(r"(?:dense|pruned|tuned) ([\d.]+)", found))
    size = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64)  # of attention and feed-forward layers
    assert found.count(f": {round(0.2 * size)} of {size} weights active") == 2
    assert pruned < tuned and dense - 0.1 < tuned


def test_criteria_are_compared_in_fine_tuning_from_one_dense_checkpoint(tmp_path):
    found = python(EXAMPLES / "fine_tuning_criteria.py", 1, 0.1, cwd=tmp_path)
    accuracies = dict(re.findall(r"^\| ([\w, ]+) \| ([\d.]+) \+- 0.0 \|$", found, re.MULTILINE))
    assert len(accuracies) == 1 + 2 * 6 and float(accuracies["magnitude, gradient"]) > 50


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_run_here_and_is_short(path):
    assert path.name in Path(__file__).read_text().split("def test_every_example")[0]
    assert len(path.read_text().splitlines()) <= 50
