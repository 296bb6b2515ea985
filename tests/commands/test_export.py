"""`export RUN --format ...` through the command line."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from east_plugins import export
from east_plugins.__main__ import main
from east_plugins.training import runs

onnxruntime = pytest.importorskip("onnxruntime")
FORMATS = ["c", "onnx", "safetensors"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "east"
    flags = "--data digits --limit 160 --model resnet20 --width 4 --batch-size 32 --density 0.1 --epochs 3 --threads 1"
    flags += " --device cpu --method east+connected --quiet"
    assert main(["train", *flags.split(), "--out", str(folder)]) == 0
    return folder


def umask():
    current = os.umask(0)
    os.umask(current)
    return current


def refused(capsys, *argv):
    """The one line that a command fails with."""
    assert main(list(map(str, argv))) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("format", FORMATS)
def test_writes_a_file_that_was_checked(run, format, tmp_path, capsys):
    out = tmp_path / f"digits.{format}"
    assert main(["export", str(run), "--format", format, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed and "largest difference" in printed
    assert ("bytes of activations" in printed) == (format == "c")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask()
    assert format != "c" or "void digits_run(const float *input, float *output);" in out.read_text()


def test_the_c_file_is_a_program_that_classifies_an_image(run, tmp_path):
    out, program = tmp_path / "digits.c", tmp_path / "digits"
    assert main(["export", str(run), "--format", "c", "--out", str(out)]) == 0
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O1"]
    subprocess.run(["cc", *strict, "-DDIGITS_MAIN", out, "-o", program, "-lm"], check=True)
    trained = runs.load_run(run)
    test = runs.load_data(trained.config).test
    for image, normalised in zip(test.images[:5], next(test.batches(5))[0], strict=True):
        height, width = image.shape[1:]
        pgm = f"P5\n{width} {height}\n255\n".encode() + image.numpy().tobytes()
        printed = subprocess.run([program], input=pgm, capture_output=True, check=True, text=False).stdout
        scores = trained.model(normalised[None])[0]
        assert printed.decode().startswith(f"class {scores.argmax()} of 10, score {scores.max():.3g}"[:-2])
    noted = b"P5 # by a camera\n#two\n%d %d\n# 8 bits\n255\n" % (width, height) + image.numpy().tobytes()
    assert subprocess.run([program], input=noted, capture_output=True, check=True, text=False).stdout == printed
    for wrong in (b"P5\n9 9\n255\n", b"P6" + noted[2:], noted[:-1], b"P5\n16 16\n65535\n" + bytes(512), b"", b"P5#"):
        assert subprocess.run([program], input=wrong, capture_output=True).returncode == 2


def test_files_say_how_inputs_are_made_and_what_outputs_are_called(run, tmp_path):
    for kind in ("c", "onnx"):
        assert main(["export", str(run), "--format", kind, "--out", str(tmp_path / f"net.{kind}")]) == 0
    test = runs.load_data(runs.read_config(run)).test
    (tmp_path / "main.c").write_text(
        '#include "net.c"\n#include <stdio.h>\nint main(void) { printf("%.9g %.9g %s", net_mean[0], net_deviation[0], '
        "net_labels[7]); return 0; }\n"
    )
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-O0"]
    subprocess.run(["cc", *strict, tmp_path / "main.c", "-o", tmp_path / "main", "-lm"], check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True).stdout.split()
    assert [np.float32(word) for word in printed[:2]] == [test.mean.item(), test.std.item()] and printed[2] == "7"
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["mean"]) == [test.mean.item()] and json.loads(metadata["labels"])[7] == "7"
    assert metadata["input_layout"] == "batch, channel, row, column"


def test_any_label_is_a_string_in_c(tmp_path):
    labels = ('say "hi"', "back\\slash", "what??/", "Käse 7", "new\nline1", "")
    text = export.Interface((1.0,), (2.0,), labels).in_c("net")
    loop = "int main(void) { for (int i = 0; i < 6; i++) { puts(net_labels[i]); putchar(1); } return 0; }"
    (tmp_path / "a.c").write_text(f"#include <stdio.h>\n{text}\n{loop}\n")
    subprocess.run(["cc", "-std=c99", "-trigraphs", tmp_path / "a.c", "-o", tmp_path / "a"], check=True)
    printed = subprocess.run([tmp_path / "a"], capture_output=True).stdout.decode()
    assert tuple(printed.split("\n\x01")[:-1]) == labels


def test_safetensors_of_a_run_load_without_anything_else(run, tmp_path):
    out = tmp_path / "digits.safetensors"
    assert main(["export", str(run), "--format", "safetensors", "--out", str(out)]) == 0
    model, masks = export.load_sparse(out)
    trained = runs.load_run(run)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trained.model.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in trained.masks.items())
    assert any("scale" in name for name in model.state_dict()), "the run shares weights"


def test_a_file_that_disagrees_is_not_left(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[export.verify.__module__], "TOLERANCE", -1.0)
    out = tmp_path / "digits.c"
    assert "differs from the PyTorch network" in refused(capsys, "export", run, "--format", "c", "--out", out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["no folder", "empty", "unfinished", "no checkpoint", "cut checkpoint", "not ours"])
def test_a_missing_unfinished_or_damaged_run_is_refused(run, format, damage, tmp_path, capsys):
    broken, out = tmp_path / "run", tmp_path / "out"
    if damage != "no folder":
        shutil.copytree(run, broken)
    if damage == "empty":
        shutil.rmtree(broken)
        broken.mkdir()
    elif damage == "unfinished":
        (broken / "summary.json").unlink()
    elif damage == "no checkpoint":
        (broken / "checkpoint.pt").unlink()
    elif damage == "cut checkpoint":
        content = (broken / "checkpoint.pt").read_bytes()
        (broken / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    elif damage == "not ours":
        torch.save({"weights": torch.zeros(3)}, broken / "checkpoint.pt")
    assert str(broken) in refused(capsys, "export", broken, "--format", format, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("content", ['{"method": "east"}', "[]", '{"classes": "ten", "input_shape": 5}', "{"])
@pytest.mark.parametrize("command", ["export {} --format c --out {}.c", "bench inference {}"])
def test_a_damaged_summary_is_refused(run, content, command, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(content)
    assert "summary.json" in refused(capsys, *command.format(tmp_path / "run", tmp_path / "a").split())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_target_that_cannot_be_written_is_refused(run, tmp_path, capsys):
    for out in (tmp_path, tmp_path / "no" / "a.c", "/proc/a.c", "/dev/full/a.c"):
        assert f"--out {out}" in refused(capsys, "export", run, "--format", "c", "--out", out)
    assert not list(tmp_path.iterdir())


def test_an_unsupported_layer_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "gated_network.py").write_text(
        "from torch import nn\n\n\ndef gated(model):\n    model.fc = nn.Sequential(model.fc, nn.Softplus())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder, out = tmp_path / "run", tmp_path / "out"
    flags = "--data digits --limit 64 --model resnet20 --width 4 --epochs 1 --density 0.1 --method rigl --device cpu"
    assert main(["train", *flags.split(), "--quiet", "--transform", "gated_network:gated", "--out", str(folder)]) == 0
    capsys.readouterr()
    for format in ("c", "onnx"):
        error = refused(capsys, "export", folder, "--format", format, "--out", out)
        assert "fc.1: export does not support softplus" in error
    assert not out.exists()


def test_without_a_compiler_no_c_file_is_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "C compiler" in refused(capsys, "export", run, "--format", "c", "--out", tmp_path / "a.c")
    assert not list(tmp_path.iterdir())


def test_wrong_flags_are_refused(run, tmp_path, capsys):
    out = tmp_path / "a.c"
    assert "--format" in refused(capsys, "export", run, "--out", out)
    assert "onnx" in refused(capsys, "export", run, "--format", "tflite", "--out", out)
    assert "--name" in refused(capsys, "export", run, "--format", "c", "--out", tmp_path / "my-net.c")
    assert "--check" in refused(capsys, "export", run, "--format", "c", "--out", out, "--check", "0")
    assert "--density" in refused(capsys, "bench", "inference", run, "--density", "0.1")
    assert not list(tmp_path.iterdir())
