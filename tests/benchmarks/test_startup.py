"""Starting the package beside `import torch`: `python -m east_plugins bench startup` prints the times."""

import json
import subprocess
import sys

import pytest

from east_plugins.__main__ import main
from east_plugins.measure.startup import CANDIDATES


@pytest.mark.slow
def test_every_start_is_timed_as_a_multiple_of_import_torch(capsys):
    assert main("bench startup --repeats 3 --json".split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == list(CANDIDATES)
    assert result["ratios"].keys() == {f"{name} over import torch" for name in CANDIDATES if name != "import torch"}


NO_TORCH = ["", "--help", "--version", "bench --help", "bench step --help", "bench update --nonsense", "analyze --help"]


MISSING = [f"{command} --config missing.yaml --out never" for command in ("train", "compare", "study", "cycles")]


@pytest.mark.parametrize("words", [*NO_TORCH, *MISSING, "analyze", "export --help"])
def test_what_needs_no_torch_does_not_import_it(words):
    run = f"from east_plugins.__main__ import main; main({words.split()!r})" if words else ""
    code = f"import sys, east_plugins\ntry:\n    {run or 'pass'}\nexcept SystemExit:\n    pass\n"
    code += "print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "False"
