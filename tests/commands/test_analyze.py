"""The command `analyze` on finished runs."""

import json

import pytest
from PIL import Image

from east_plugins.__main__ import main

TRAIN = "--model resnet20 --width 4 --data digits --limit 64 --epochs 2 --density 0.2".split()
TRAIN += "--threads 1 --device cpu --quiet".split()


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


@pytest.mark.parametrize("pixels", [16, 80], ids=["in memory", "on disk"])
def test_images_are_of_all_classes_where_the_data_is_sorted_by_them(pixels, tmp_path, capsys, monkeypatch):
    for i in range(40):
        folder = tmp_path / "data" / ("test" if i < 20 else "train") / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (pixels, pixels), 5 * i).save(folder / f"{i}.png")
    data = f"--data folder --data-dir {tmp_path / 'data'} --image-size {pixels} --engine dense --epochs 1 --out".split()
    for name in ("a", "b"):
        assert main(["train", *TRAIN, "--method", "rigl", "--seed", str(ord(name)), *data, str(tmp_path / name)]) == 0
    labels = []
    monkeypatch.setattr(
        "east_plugins.measure.analysis.gradient_norms",
        lambda model, masks, x, y: labels.append(y.tolist()) or dict.fromkeys(masks, 0.0),
    )
    code, *_ = analyze(capsys, tmp_path / "a", tmp_path / "b", "--images", 10)
    assert code == 0 and len(labels[0]) == 10 and {0, 1} == set(labels[0]) and labels[0] == labels[1]


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
