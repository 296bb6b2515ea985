import json

import pytest
import torch

from east_plugins.__main__ import main
from east_plugins.measure.networks import Subject

SMALL = "bench inference --model resnet20 --density 0.05 --batch 1,2 --repeats 2".split()


def test_json(capsys):
    assert main([*SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in result["rows"]]
    kinds = ["pytorch_dense", "onnxruntime_dense", "onnx", "c"]
    assert names == kinds + [f"{kind}_batch2" for kind in kinds]
    assert {"onnxruntime_dense_over_c", "onnxruntime_dense_over_onnx"} <= set(result["ratios"])
    assert result["threads"] == 1 and {"torch", "onnxruntime"} <= set(result["versions"])
    assert result["nonzeros"] == round(0.05 * result["maskable"])
    assert result["sizes"]["c_object"] < result["sizes"]["onnxruntime_dense"]
    assert max(result["differences"].values()) <= 1e-5
    median = {row["name"]: row["median_ms"] for row in result["rows"]}
    assert result["ratios"]["onnxruntime_dense_over_c"] == pytest.approx(median["onnxruntime_dense"] / median["c"])


@pytest.mark.parametrize("masks", ["trained", "connected-trained", "random"])
def test_table_and_chart(masks, tmp_path, capsys):
    assert main([*SMALL, "--masks", masks, "--plot", str(tmp_path / "bars.png")]) == 0
    assert "onnxruntime_dense_over_c" in capsys.readouterr().out
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_dense_network_has_no_c_row(capsys, caplog):
    assert main([*"bench inference --model resnet18 --density 1 --batch 1 --repeats 1 --json".split()]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["pytorch_dense", "onnxruntime_dense", "onnx"]
    assert "too many for a sparse network" in caplog.text


@pytest.mark.parametrize("flags", ["--repeats 0", "--batch 0", "--batch x", "--threads 0", "--model no", "--masks no"])
def test_refusals(flags, capsys):
    assert main([*SMALL, *flags.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("start, end", [("ERK", "trained"), ("connected", "connected-trained")])
def test_trained_masks_moved(start, end):
    start, moved = (Subject("resnet20", 10, 0.05, masks).drawn for masks in (start, end))
    assert {name: mask.sum() for name, mask in start.items()} == {name: mask.sum() for name, mask in moved.items()}
    assert any(not torch.equal(start[name], moved[name]) for name in start)


def test_a_chart_of_no_known_ending_is_refused_before_measuring(capsys, monkeypatch):
    monkeypatch.setattr("east_plugins.measure.inference.inference", lambda *_: pytest.fail("measured"))
    assert main([*SMALL, "--plot", "a.foo"]) == 2
    assert "--plot a.foo must end in one of" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/no/such/folder/a.png", "/proc/a.png", "a.nosuchformat"])
def test_a_chart_that_cannot_be_written(path, capsys):
    assert main([*SMALL, "--plot", path]) == 2
    captured = capsys.readouterr()
    assert "--plot" in captured.err and captured.err.count("\n") == 1 and not captured.out
