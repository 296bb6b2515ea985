"""The command `analyze` on finished runs."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from east_plugins.__main__ import main
from east_plugins.training.verdict import verdict

FIXTURES = Path(__file__).parents[1] / "fixtures"

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
    assert code == 0 and "Jaccard" in out and "     -" in out and f"{folders / 'a'}: " in out
    assert "positive inputs of each ReLU" in out and "conv1.weight" in out


def test_a_run_that_was_interrupted_is_analyzed_in_its_last_state(tmp_path, capsys):
    shutil.copytree(FIXTURES / "run-0.1", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    code, out, _ = analyze(capsys, tmp_path / "run", "--images", 16, "--json")
    run = json.loads(out)["runs"][0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert code == 0 and not run["finished"] and run["test_accuracy"] is None
    assert (run["epoch"], run["epochs"]) == (len(lines), 8)
    assert run["gradient_flow"] > 0 and run["validation_accuracy"] == lines[-1]["validation_accuracy"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before, "nothing is written"
    (tmp_path / "run" / "checkpoint.pt").unlink()  # as before the first one
    run = json.loads(analyze(capsys, tmp_path / "run", "--json")[1])["runs"][0]
    assert run["effective_density"] == lines[-1]["effective_density"] and run["gradient_flow"] is None
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "not an epoch is over yet" in analyze(capsys, tmp_path / "run")[1]


def test_a_comparison_stands_for_its_runs(tmp_path, capsys):
    flags = [*TRAIN[:-1], "--methods", "static,rigl", "--sparsities", "0.8", "--out", str(tmp_path / "all")]
    flags.remove("--density"), flags.remove("0.2")
    assert main(["compare", *flags]) == 0
    report = json.loads(analyze(capsys, tmp_path / "all", tmp_path / "all" / "rigl-0.8-seed0", "--json")[1])
    assert [run["method"] for run in report["runs"]] == ["rigl", "static"] and len(report["jaccard"]) == 2


def test_the_verdict_names_what_is_dead_and_since_when(tmp_path, capsys):
    flags = "--method static --density 0.0013 --epochs 2 --out".split()
    assert main(["train", *TRAIN, *flags, str(tmp_path / "dead")]) == 0
    _, out, _ = analyze(capsys, tmp_path / "dead")
    assert "dead: no active weight lies on a path from input to output since epoch 1; try +connected" in out


def test_a_layer_that_dies_is_named_with_its_epoch():
    def line(epoch, *live):
        return {"epoch": epoch, "loss": 1.0, "effective_density": 0.1, "layers": {"a": [5, 5], "b": [4, live[0]]}}

    layers = [{"name": "a", "on_path": 5}, {"name": "b", "on_path": 0}]
    entry = {"layers": layers, "density": 0.2, "effective_density": 0.1, "nonzeros": 9, "test_accuracy": None,
             "validation_accuracy": 0.5}  # fmt: skip
    metrics = [line(1, 4), line(2, 0), line(3, 2), line(4, 0), line(5, 0)]
    assert verdict(entry, metrics) == "nothing passes through 1 of 2 layers: b since epoch 4"
    assert verdict(entry, [{**m, "loss": None} for m in metrics]).startswith("diverged: the loss is not finite")
    old = [{name: value for name, value in m.items() if name != "layers"} for m in metrics]
    assert verdict(entry, old) == "nothing passes through 1 of 2 layers: b"


@pytest.mark.parametrize("args, said", [
    (["nowhere"], "is no run directory"),
    (["{a}", "--images", "1"], "--images must be at least 2, got 1"),
    ([], "RUN"),
])  # fmt: skip
def test_wrong_input_is_refused_in_one_line(folders, capsys, args, said):
    code, out, errors = analyze(capsys, *(arg.format(a=folders / "a") for arg in args))
    assert code == 2 and not out and said in errors and len(errors.strip().splitlines()) == 1
