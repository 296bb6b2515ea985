"""Files that somebody else wrote: reading them runs and imports nothing that their reader did not name himself."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.export import load_sparse
from east_plugins.options.flags import read_yaml
from east_plugins.plugins import registry
from east_plugins.training.datasets import unpickle

pytest.importorskip("safetensors")
NAMED = ["growth", "death", "redistribution", "sparse-init", "density-schedule", "decay-schedule", "transform",
         "east-dyrelu-type"]  # fmt: skip
PAYLOAD = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n\n\ndef rule(*args, **kwargs):\n    pass\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its export."""
    folder = tmp_path_factory.mktemp("stranger")
    flags = "--method rigl+dyrelu --model cnn --width 4 --data digits --limit 100 --density 0.3 --epochs 2 --threads 1"
    assert main(["train", *flags.split(), "--quiet", "--out", str(folder / "run")]) == 0
    assert main(["export", str(folder / "run"), "--format", "safetensors", "--out", str(folder / "net.st")]) == 0
    return folder


def changed(finished, to, field):
    """The run and the export with `field` set to a payload that lies beside them."""
    to = to / "run"
    to.mkdir()
    for file in (finished / "run").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = yaml.safe_load((to / "config.yaml").read_text())
    config[field] = f"payload_{field.replace('-', '_')}:rule"
    (to / "config.yaml").write_text(yaml.safe_dump(config))
    (to / f"payload_{field.replace('-', '_')}.py").write_text(PAYLOAD)
    return to


def with_config(finished, to, **settings):
    """The export, its metadata saying otherwise, its digest made anew as its writer would."""
    import safetensors
    from safetensors.torch import save_file

    from east_plugins.export import safetensors as ours

    with safetensors.safe_open(finished / "net.st", "pt") as file:
        header = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("digest")
    header["network"]["config"] |= settings
    header["digest"] = ours._digest(tensors, header)
    save_file(tensors, to, {key: json.dumps(value) for key, value in header.items()})
    return to


@pytest.mark.parametrize("field", NAMED)
def test_no_field_of_a_run_is_imported(field, finished, tmp_path, monkeypatch, capsys):
    run = changed(finished, tmp_path, field)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for command in (
        ["analyze", "."],
        ["export", ".", "--format", "c", "--out", "a.c"],
        ["train", "--resume", "--out", "."],
    ):
        monkeypatch.chdir(run)
        assert main(command) == 2
        assert "nothing is imported on a file's word" in capsys.readouterr().err
        monkeypatch.chdir(tmp_path)
        assert main([word if word != "." else "run" for word in command]) == 2
    assert not (run / "ran").exists()


@pytest.mark.parametrize("field", NAMED)
def test_no_field_of_an_export_is_imported(field, finished, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "payload_in_export.py").write_text(PAYLOAD)
    file = with_config(finished, tmp_path / "net.st", **{field: "payload_in_export:rule"})
    with pytest.raises(UsageError, match="nothing is imported"):
        load_sparse(file)
    assert not (tmp_path / "ran").exists()


def test_an_export_names_no_file_to_be_read(finished, tmp_path):
    (tmp_path / "secret.yaml").write_text("model: cnn\n")
    with pytest.raises(UsageError, match="names another file"):
        load_sparse(with_config(finished, tmp_path / "net.st", config=str(tmp_path / "secret.yaml")))


def test_a_plugin_that_the_user_names_is_imported(finished, tmp_path, monkeypatch, capsys):
    run = changed(finished, tmp_path, "growth")
    (run / "payload_growth.py").write_text("def rule(layer):\n    return layer.weight\n")
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(registry, "_trusted", set())
    assert main(["analyze", "."]) == 2
    assert main(["analyze", ".", "--trust", "payload_growth:rule"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("module", ["yaml", "numpy", "safetensors", "sklearn"])
def test_modules_that_lie_in_the_folder_are_not_taken_for_installed_ones(module, finished, tmp_path):
    run = changed(finished, tmp_path, "growth")
    (run / "config.yaml").write_bytes((finished / "run/config.yaml").read_bytes())
    (run / f"{module}.py").write_text(PAYLOAD)
    found = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "east_plugins", "analyze", "."]
    done = subprocess.run(command, cwd=run, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found))})
    assert done.returncode == 0 and not (run / "ran").exists()


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--growth", "os:system"), ("--growth", "os:_exit"), ("--growth", "math:pi"), ("--death", "builtins:id"),
     ("--east-dyrelu-type", "os:close"), ("--transform", "builtins:id"), ("--redistribution", "builtins:print"),
     ("--sparse-init", "builtins:dict")],
)  # fmt: skip
def test_names_that_are_no_plugin_are_not_called(flag, name, tmp_path, capsys):
    on = ["--east-dyrelu"] if "dyrelu" in flag else []
    command = ["train", "--method", "rigl", "--model", "cnn", "--epochs", "1", *on, flag, name]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert flag in said and name in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_yaml_that_multiplies_itself_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 9)
    ]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    (tmp_path / "large.yaml").write_text("a: " + "x" * 2**21)
    for name, words in (("bomb", "repeats parts"), ("deep", "nested deeper"), ("large", "larger than")):
        with pytest.raises(UsageError, match=words):
            read_yaml(tmp_path / f"{name}.yaml", "--config")


class _Calls:
    def __init__(self, module, name, *args):
        self.what = module, name, args

    def __reduce__(self):
        import importlib

        module, name, args = self.what
        return getattr(importlib.import_module(module), name), args


@pytest.mark.parametrize(
    "call", [("os", "mkdir", "made"), ("numpy.dtypes", "Float64DType"), ("subprocess", "call", "x")]
)
def test_a_pickle_of_images_calls_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": _Calls(*call)}, protocol=2))
    with pytest.raises(UsageError):
        unpickle(tmp_path / "batch")
    assert not (tmp_path / "made").exists()


def test_a_damaged_pickle_is_one_line_or_still_plain_values(tmp_path):
    content = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, protocol=2)
    file, generator = tmp_path / "batch", np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
        file.write_bytes(damaged)
        try:
            unpickle(file)
        except UsageError as error:
            assert "\n" not in str(error)


def test_every_flipped_bit_of_an_export_is_noticed_or_harmless(finished, tmp_path):
    content, generator = (finished / "net.st").read_bytes(), np.random.default_rng(0)
    whole = {name: value.clone() for name, value in load_sparse(finished / "net.st")[0].state_dict().items()}
    for _ in range(100):
        damaged = bytearray(content)
        damaged[generator.integers(len(content))] ^= 1 << generator.integers(8)
        (tmp_path / "net.st").write_bytes(damaged)
        try:
            read = load_sparse(tmp_path / "net.st")[0].state_dict()
        except UsageError:
            continue
        assert all(bool((read[name] == value).all()) for name, value in whole.items())
