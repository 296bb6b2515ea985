"""The command `analyze` on finished runs."""

import json

import pytest

from east_plugins.__main__ import main

TRAIN = "--model resnet20 --width 4 --data digits --limit 64 --epochs 2 --density 0.2 --quiet --threads 1".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    others = {"a": [], "b": ["--seed", "1"], "wide": ["--width", "8"], "shared": ["--method", "rigl+share"]}
    for name, extra in others.items():
        assert main(["train", *TRAIN, "--method", "rigl", *extra, "--out", str(root / name)]) == 0
    return root


def analyze(capsys, *args):
    capsys.readouterr()
    code = main(["analyze", *map(str, args)])
    return code, *capsys.readouterr()


def test_runs_are_measured_and_compared(folders, capsys):
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("*")}
    names = ("a", "b", "wide", "shared")
    code, out, _ = analyze(capsys, *(folders / name for name in names), "--images", 40, "--json")
    report = json.loads(out)
    assert code == 0 and [run["run"] for run in report["runs"]] == [str(folders / name) for name in names]
    for run in report["runs"]:
        assert 0 <= run["effective_density"] <= run["density"] <= run["itop_rate"] <= 1
        assert run["gradient_flow"] == pytest.approx(sum(layer["gradient_norm"] for layer in run["layers"]))
        assert run["nonzeros"] == sum(layer["active"] for layer in run["layers"])
        assert len(run["relus"]) == 19 and all(0 <= share <= 1 for share in run["relus"])
    same = report["jaccard"]
    assert all(same[i][i] == 1 for i in range(4)) and 0 < same[0][1] == same[1][0] < 0.5
    assert same[0][2] is None, "another width is another network"
    assert {path: path.stat().st_mtime_ns for path in folders.rglob("*")} == before, "nothing is written"


def test_tables_for_people(folders, capsys):
    code, out, _ = analyze(capsys, folders / "a", folders / "wide", "--layers")
    assert code == 0 and "Jaccard" in out and "     -" in out
    assert "positive inputs of each ReLU" in out and "conv1.weight" in out


@pytest.mark.parametrize("args, said", [
    (["nowhere"], "is no run directory"),
    (["{a}", "--images", "1"], "--images must be at least 2, got 1"),
    ([], "RUN"),
])  # fmt: skip
def test_wrong_input_is_refused_in_one_line(folders, capsys, args, said):
    code, out, errors = analyze(capsys, *(arg.format(a=folders / "a") for arg in args))
    assert code == 2 and not out and said in errors and len(errors.strip().splitlines()) == 1
