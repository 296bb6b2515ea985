"""The scripts in tests/examples run as they stand, from any folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent / "examples"
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


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
    text = " ".join(text.split())
    assert "--growth-again X" in text and "factor on weights that were active before (default: 0.1)" in text


def test_the_three_tricks_in_a_loop_end_at_the_target_without_dyrelu(tmp_path):
    text = python(EXAMPLES / "three_tricks.py", cwd=tmp_path)
    lines = re.findall(r"step (\d+): (\d+) active weights, (\d+) parameters", text)
    active, parameters = ({int(line[0]): int(line[i]) for line in lines} for i in (1, 2))
    assert active[6] == pytest.approx(4 * active[40], abs=3) and active[24] == active[40]  # the peak, then the target
    assert parameters[6] > parameters[24] == parameters[40]


def test_a_mask_in_itops_manner_takes_cycles_and_dyrelu(tmp_path):
    found = python(EXAMPLES / "attached.py", cwd=tmp_path)
    assert found == "ITOP: 74 active weights, finished: True\nactivations: ReLU, ReLU, Flatten\n"


def test_the_engine_computes_a_method_by_name(tmp_path):
    assert re.fullmatch(
        r"\d+ active weights, the engine is sparse\n", python(EXAMPLES / "sparse_engine.py", cwd=tmp_path)
    )


def test_a_network_becomes_a_c_file(tmp_path):
    found = python(EXAMPLES / "export_to_c.py", tmp_path, cwd=tmp_path)
    assert (
        re.match(r"digits\.c: static memory \d+ bytes", found)
        and "void digits_run" in (tmp_path / "digits.c").read_text()
    )


@NEEDS_COMPILER
def test_the_c_file_is_a_program_that_classifies(tmp_path):
    found = python(EXAMPLES / "export_to_c.py", tmp_path, cwd=tmp_path)
    assert re.search(r"^class \d of 10, score \S+, label \d$", found, re.MULTILINE), found
