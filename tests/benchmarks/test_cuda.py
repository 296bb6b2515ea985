"""cuda.sh stays alive on the CPU: tiny parts, stopped and continued, and its refusals."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).with_name("cuda.sh")


def cuda(*arguments):
    result = subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return result.returncode, result.stdout, result.stderr


def jpegs(count=12):
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog", "owl")):
            for j in range(count):
                file = io.BytesIO()
                pixels = draw.integers(80 * i, 80 * i + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "JPEG")
                yield f"{part}/{name}/{j:04}.jpg", file.getvalue()


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, content in jpegs():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_an_experiment_is_stopped_and_continued(archive, tmp_path):
    out = tmp_path / "experiment"
    part = ("experiment", "resnet34-connected", "--tiny", "--data", archive, "--out", out, "--jobs", 2)
    code, text, _ = cuda(*part, "--seconds", 0)
    assert code == 0 and text.startswith("resnet34-connected: 0 of 2 runs finished; the same command goes on")
    code, text, errors = cuda(*part)
    assert code == 0 and text == "resnet34-connected: 2 of 2 runs finished\n", errors
    assert cuda("experiment", "resnet34-connected", "--tiny", "--out", out)[1] == text  # needs the archive no more
    code, text, _ = cuda("experiment", "table", "--out", out)
    assert code == 0 and "| rigl+connected |" in text and "| east+connected |" in text
    summaries = json.loads((out / "table.json").read_text())["resnet34"]
    assert {s["epochs"] for s in summaries.values()} == {4} and len(summaries) == 2


@pytest.mark.slow
def test_checks_end_in_a_table(tmp_path):
    code, text, errors = cuda("--tiny", "--out", tmp_path / "out")
    assert code == 0, errors
    result = json.loads((tmp_path / "out" / "cuda.json").read_text())
    rows = result["steps"]["resnet34"]["rows"]
    assert {"dense", "ours", "ours, engine auto", "EAST, DyReLU", "EAST, after"} <= set(rows)
    assert rows["dense"]["ratio"] == 1 and not result["steps"]["resnet34"]["failed"]
    assert set(result["updates"]["resnet34"]["rows"]) == {"gradient", "random"}
    assert all(part["state"] == "ok" and part["passed"] for part in result["tests"].values())
    assert "resnet34, EAST, DyReLU" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--itop", "/nowhere", "--tiny"], "--itop /nowhere is no checkout of ITOP"),
        (["--nonsense"], "--nonsense"),
        (["experiment", "resnet99", "--out", "x"], "unknown part 'resnet99'; did you mean resnet"),
        (["experiment", "resnet34-paper", "--tiny", "--out", "x"], "--data must name a folder or archive"),
        (["experiment", "resnet34-paper", "--tiny", "--out", "x", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["experiment", "resnet34-paper", "--tiny", "--out", "x", "--epochs", "0"], "--epochs must be at least 1"),
        (["experiment", "table", "--out", "x"], "--out"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(arguments, message, tmp_path):
    arguments = [str(tmp_path / "x") if word == "x" else word for word in arguments]
    code, _, errors = cuda(*arguments)
    lines = [line for line in errors.splitlines() if not line.endswith(": loading PyTorch")]  # where that takes long
    assert code == 2 and message in errors and len(lines) == 1
    assert not list(tmp_path.iterdir())
