"""Commands that are silent for long say that they are at work."""

import json
import subprocess
import sys

import pytest

from east_plugins.__main__ import main
from east_plugins.commands import waiting

TRAIN = "train --method rigl --model cnn --density 0.1 --epochs 2 --limit 300 --threads 1 --loggers none --out".split()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST", 0.0)
    monkeypatch.setattr(waiting, "SILENCE", 0.01)


def test_a_silent_command_says_what_it_does(impatient, tmp_path, capsys):
    assert main([*TRAIN, str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("east_plugins train: ")]
    assert any("epoch 1 of 2" in line or "epoch 2 of 2" in line for line in said)


def test_quiet_is_quiet_and_json_stands_alone(impatient, tmp_path, capsys):
    assert main([*TRAIN, str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["analyze", str(tmp_path / "run"), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["runs"] and "east_plugins analyze: " in printed.err


def test_a_script_says_what_it_says(impatient, tmp_path, capsys):
    (tmp_path / "main.py").write_text("import time; time.sleep(0.2); print('done')")
    assert main(["run", str(tmp_path / "main.py")]) == 0
    assert capsys.readouterr() == ("done\n", "")


def test_who_cannot_be_told_stops_nothing(impatient, tmp_path, monkeypatch):
    with open(tmp_path / "err", "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
    assert main(["info", *"--model resnet20 --width 4 --density 0.2".split()]) == 0


def test_streams_and_loggers_are_as_before(tmp_path):
    before = sys.stdout, sys.stderr, list(waiting.doing.logger.handlers)
    assert main(["info", "--model", "nope"]) == 2
    assert (sys.stdout, sys.stderr, list(waiting.doing.logger.handlers)) == before


def test_plugins_has_its_first_lines_before_pytorch_is_loaded():
    code = "import sys; sys.modules['torch'] = None\nfrom east_plugins.__main__ import main\nmain(['plugins'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.startswith("method:") and "  rigl " in printed
