"""`run` on a script in the manner of ES2, EAST's authors' own code, whose network has DyReLU and sharing built in."""

import re
import sys
from pathlib import Path

import pytest
import torch

from east_plugins import __main__ as command_line
from east_plugins.upstream import hosts

SCRIPT = str(Path(__file__).parent / "es2" / "main.py")
OWN = 3 * 8 * 9 + 2 * 8 * 8 * 9 + 8 * 4  # conv1, two blocks of their own, the classifier
SHARED = 2 * 8 * 8 * 9
TARGET = round(0.1 * (OWN + SHARED))

pytestmark = pytest.mark.usefixtures("elsewhere")


def run(capsys, *arguments):
    """Exit code, what the script printed, what the launcher said, active weights by step."""
    code = command_line.main(["run", SCRIPT, "--sparse", *arguments])
    out, said = capsys.readouterr()
    return code, out, said, {int(s): int(n) for s, n in re.findall(r"step (\d+) active (\d+)", out)}


def total(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("cyclic", [[], ["--cyclic"]])
def test_the_host_is_recognised_and_its_masks_are_its_own(capsys, cyclic):
    """Attaching for the state alone changes no number, cycles of its own included."""
    plain = run(capsys, *cyclic)
    del sys.modules["sparselearning"], sys.modules["sparselearning.core"]
    code, out, said, active = run(capsys, *cyclic, "--east-state", "state.pt")
    assert code == 0 and "ES2 host" in said
    assert out == plain[1]
    state = torch.load("state.pt")
    assert total(state["masks"]) == active[40]
    assert set(state["masks"]) == {
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.1.conv1.weight",
        "classifier.weight",
    }
    assert total(state["fired_masks"]) >= max(active.values())


@pytest.mark.parametrize("ratio", [1, 2, 6])
def test_our_host_in_its_place_holds_exact_counts(capsys, ratio):
    code, out, said, active = run(capsys, "--east-host", "own", "--east-state", "state.pt", "--ratio", str(ratio))
    assert code == 0 and "east_plugins host" in said and "left dense" not in said
    unshared = 3 * 8 * 9 + 4 * 8 * 8 * 9 + 8 * 4
    assert set(active.values()) == {round(0.1 * unshared)}  # in the weights of its own, as the script asks
    assert f"'total_params': {unshared}" in out and f"'active_normal_params': {round(0.1 * unshared)}" in out


def test_our_host_runs_the_scripts_cycles_and_closes_them_at_the_target(capsys):
    code, _, _, active = run(capsys, "--east-host", "own", "--cyclic", "--epochs", "5", "--east-state", "state.pt")
    assert code == 0
    assert [active[step] for step in (5, 10, 15, 20)] == [3 * TARGET, TARGET, 3 * TARGET, TARGET]
    assert {active[step] for step in range(21, 51)} == {TARGET}
    assert total(torch.load("state.pt")["masks"]) == TARGET


@pytest.mark.parametrize("owner", ["script", "own"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--east-dyrelu"], r"--east-dyrelu: the network has DyReLU of its own, DyReLUB at layer1\.0\.relu1"),
        (["--east-share", "--plain"], "--east-share: the network shares 1,152 weights between its blocks by itself"),
        (["--east-cyclic", "--cyclic"], "--east-cyclic"),
    ],
)
def test_our_flags_do_not_double_its_built_in_tricks(capsys, owner, arguments, message):
    code, out, said, _ = run(capsys, *arguments, "--east-host", owner)
    assert code == 2 and len(said.splitlines()) == 1 and re.search(message, said)
    assert "loss" not in out


@pytest.mark.parametrize("owner", ["script", "own"])
def test_our_cycles_serve_where_its_own_are_off(capsys, owner):
    code, _, _, active = run(capsys, "--east-cyclic", "--east-cyclic-multiplier", "4", "--east-host", owner)
    assert code == 0
    assert [active[step] for step in (4, 8, 12, 16, 40)] == [4 * TARGET, TARGET, 4 * TARGET, TARGET, TARGET]


def test_a_host_is_found_by_lying_in_the_folder():
    folder = Path(hosts.__file__).parent
    assert {adapter.__module__.rpartition(".")[2] for adapter in hosts.adapters()} == {
        path.stem for path in folder.glob("*.py")
    } - {"__init__", "family"}
