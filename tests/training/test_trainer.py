"""The trainer through its command line: what a run leaves, resuming, interrupting, refusals."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from east_plugins import Config, __version__
from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.options.methods import METHODS
from east_plugins.options.sources import from_flags
from east_plugins.training import runs
from east_plugins.training.interrupts import caught
from east_plugins.training.progress import Progress, duration
from east_plugins.training.trainer import Trainer
from east_plugins.training.trainer import train as train_run

# runs are compared bit for bit: on the CPU, and not with the engine `auto`, which may choose otherwise the second time
TINY = "--data digits --limit 160 --model resnet20 --width 4 --batch-size 32 --density 0.05 --engine sparse".split()
TINY += "--threads 1 --device cpu --quiet".split()
KEYS = {
    "method", "model", "data", "input_shape", "density", "nonzeros", "maskable", "parameters", "test_accuracy",
    "best_validation_accuracy", "itop_rate", "steps", "epochs", "seconds", "weights_sha256", "effective_density",
}  # fmt: skip


def train(out, *flags, tiny=TINY):
    return main(["train", *tiny, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def east_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "east"
    assert train(folder, "--epochs", "6") == 0
    return folder


def test_a_run_directory_holds_what_it_should(east_run):
    summary = runs.read_summary(east_run)
    assert KEYS <= set(summary)
    assert summary["nonzeros"] == 843 and summary["density"] == 843 / 17_060  # ERK with a floor rounds down by layer
    lines = runs.read_metrics(east_run)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "density", "beta", "effective_density", "itop_rate"} <= set(lines[0])
    assert lines[0]["beta"] > 0 == lines[-1]["beta"]
    assert max(line["nonzeros"] for line in lines) > 3 * summary["nonzeros"] == 3 * lines[-1]["nonzeros"]
    config = yaml.safe_load((east_run / "config.yaml").read_text())
    assert config["seed"] == 0 and config["versions"]["torch"] and config["update-frequency"] >= 1
    assert config["east-cyclic-update-frequency"] >= 1
    assert list(east_run.glob("events.out.tfevents*"))
    assert not list(east_run.glob(".*")), "no temporary files are left"


def test_the_trained_network_is_plain_and_sparse(east_run):
    run = runs.load_run(east_run)
    assert not any("east_activations" in name for name in run.model.state_dict())
    weights = dict(run.model.named_parameters())
    assert sum(int(mask.sum()) for mask in run.masks.values()) == run.summary["nonzeros"]
    for name, mask in run.masks.items():
        assert (weights[name][~mask] == 0).all()


def test_the_best_network_has_the_target_density_and_no_phase(east_run):
    # the best checkpoint of the published scripts may come from the dense part of a cycle
    summary, lines = runs.read_summary(east_run), runs.read_metrics(east_run)
    good = [ln for ln in lines if ln["nonzeros"] == summary["nonzeros"] and ln["beta"] == 0]
    assert summary["best_epoch"] in {line["epoch"] for line in good}
    assert summary["best_validation_accuracy"] == max(line["validation_accuracy"] for line in good)


def test_the_same_config_gives_the_same_weights(east_run, tmp_path):
    assert main(["train", "--config", str(east_run / "config.yaml"), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    assert runs.read_summary(tmp_path / "again")["weights_sha256"] == runs.read_summary(east_run)["weights_sha256"]
    ours, theirs = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (east_run, tmp_path / "again"))
    assert ours == theirs


def test_an_interrupted_run_saves_and_goes_on_bit_for_bit(east_run, tmp_path):
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "east_plugins", "train", *TINY, "--epochs", "6", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode != 0:  # it was not done already
        assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
        assert not (out / "summary.json").exists()
        with pytest.raises(UsageError, match="unfinished"):
            runs.load_run(out)
    assert train(out, "--epochs", "6", "--resume") == 0
    assert runs.read_summary(out)["weights_sha256"] == runs.read_summary(east_run)["weights_sha256"]
    assert [line["epoch"] for line in runs.read_metrics(out)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("saved", [None, 2])
def test_a_killed_run_goes_on_from_its_last_checkpoint(saved, east_run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, report = tmp_path / "killed", Progress.epoch

    def killed(progress, line):
        report(progress, line)
        if line["epoch"] == saved:
            monkeypatch.setattr("east_plugins.training.trainer.SAVE_EVERY", 1000)
        if line["epoch"] == 4:
            raise EOFError

    monkeypatch.setattr("east_plugins.training.trainer.SAVE_EVERY", 0 if saved else 1000)
    with monkeypatch.context() as patch, pytest.raises(EOFError):
        patch.setattr(Progress, "epoch", killed)
        train(out, "--epochs", "6")
    assert len(runs.read_metrics(out)) == 4 and (out / "checkpoint.pt").exists() == bool(saved)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')
    assert train(out, "--epochs", "6", "--resume") == 0
    assert runs.read_summary(out)["weights_sha256"] == runs.read_summary(east_run)["weights_sha256"]
    assert [line["epoch"] for line in runs.read_metrics(out)] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(out)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seconds, checkpoints", [(30, 1), (0, 3)])
def test_short_epochs_share_a_checkpoint(seconds, checkpoints, tmp_path, monkeypatch):
    saved, save = [], runs.save_checkpoint
    monkeypatch.setattr(runs, "save_checkpoint", lambda path, state: saved.append(state["epoch"]) or save(path, state))
    monkeypatch.setattr("east_plugins.training.trainer.SAVE_EVERY", seconds)
    assert train(tmp_path / "r", "--method", "static", "--epochs", "3") == 0
    assert saved[-1] == 3 and len(saved) == checkpoints


def test_resuming_a_finished_run_only_reads_it(east_run):
    before = (east_run / "summary.json").stat().st_mtime_ns
    assert train(east_run, "--epochs", "6", "--resume") == 0
    assert (east_run / "summary.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "method",
    "dense static set rigl snfs gmp granet rigl+share set+cyclic rigl+dctps east+dctps".split(),
)
def test_every_method_ends_at_its_density(method, tmp_path):
    tiny = [flag for flag in TINY if flag not in ("--density", "0.05")] if method == "dense" else TINY
    assert train(tmp_path / "r", "--method", method, "--epochs", "3", tiny=tiny) == 0
    summary = runs.read_summary(tmp_path / "r")
    wanted = 1.0 if method == "dense" else 0.05
    expected = 840 if method == "east+dctps" else round(wanted * summary["maskable"])  # rounded down in every layer
    assert summary["nonzeros"] == expected
    if method == "gmp":
        assert {line["death_rate"] for line in runs.read_metrics(tmp_path / "r")} == {0}, "it prunes only"
    if method in ("dense", "static"):
        assert summary["itop_rate"] == pytest.approx(wanted, abs=1e-3)
    else:
        assert summary["itop_rate"] > wanted + 0.01


@pytest.mark.parametrize(
    # eight channels: oneDNN's strided 1x1 convolutions in channels-last overrun their memory under eight (torch 2.13)
    "flags",
    [
        "--optimizer adam --amp",
        "--optimizer adamw --channels-last --width 8 --east-dyrelu-type mish",
        "--method rigl --lr-drops 1.5,1e308",
    ],
)
def test_other_optimizers_precision_and_layout(flags, tmp_path):
    assert train(tmp_path / "r", "--epochs", "2", "--lr-drops", "1.5", *flags.split()) == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--density 1.5", "--density"),
        ("--nesterov --momentum 0", "--nesterov needs"),
        ("--lr-drops nan", "--lr-drops"),
        ("--growth gradeint", "--growth: unknown growth 'gradeint'; did you mean gradient"),
        ("--method rigl --east-cyclic --east-cyclic-length 9", "--east-cyclic-length"),
        ("--method rigl --east-cyclic --east-cyclic-multiplier 30", "--east-cyclic-multiplier"),
        ("--method rigl --east-dyrelu --east-dyrelu-end 9", "--east-dyrelu-end 9"),
        ("--method rigl --east-share --model cnn", "--east-share"),
        ("--method rigl --east-cyclic-cycles 2", "needs --east-cyclic"),
        ("--data folder --data-dir /nowhere", "--data-dir /nowhere"),
        ("--data cifar10", "--data-dir"),
        ("--data digitz", "unknown --data 'digitz'; did you mean digits"),
        ("--model resnet35", "unknown --model 'resnet35'; did you mean resnet"),
        ("--epochs 1 --limit 60 --batch-size 128", "--epochs 1: a run of 1 steps is too short for the phase-out"),
        ("--device cuda:99", "--device cuda:99"),
        ("--epoch 3", "--epoch"),
        ("--sparsity 0.99", "--sparsity 0.99; did you mean --density?"),
        ("--learning-rate 0.1", "did you mean --lr?"),
        ("--method rigl --density 0.0001", "--density gives"),
        ("--dctps --method rigl --east-share", "prevent conflicts with the DCT"),
        ("--dctps --method rigl --sparse-init synflow", "their saliency says nothing"),
    ],
)
def test_wrong_input_is_one_line_exit_2_and_leaves_nothing(flags, words, tmp_path, capsys):
    assert train(tmp_path / "r", "--epochs", "4", *flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err and "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("out", ["file", "file/x", "file/x/y", "", "x" * 300])
def test_an_out_that_cannot_be_a_folder_is_refused(command, out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(runs, "load_data", lambda options: pytest.fail("data was read"))
    tiny = [*TINY[:8], "--epochs", "2", *(["--method", "set"] if command == "train" else ["--methods", "set"])]
    assert main([command, *tiny, "--out", out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("east_plugins: --out") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_diverges_says_so(tmp_path, capsys, caplog):
    flags = "--model cnn --width 4 --method set --epochs 2 --lr 1e6 --validation 0".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.functional.cross_entropy", lambda output, y: output.sum() * float("nan"))
        assert train(tmp_path / "r", *flags) == 0
    said = capsys.readouterr().out
    assert said.endswith("; diverged: the loss was not finite, try a smaller --lr or --clip-norm\n")
    assert "validation" not in said
    assert caplog.text.count("loss is not finite") == 1
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text()
    assert [line["loss"] for line in runs.read_metrics(tmp_path / "r")] == [None, None]


def test_a_folder_with_a_run_in_it_is_not_overwritten(east_run, capsys):
    assert train(east_run, "--epochs", "6") == 2
    assert "--resume" in capsys.readouterr().err
    assert train(east_run, "--epochs", "7", "--resume") == 2
    said = capsys.readouterr().err
    assert "holds another run: --epochs is 6 in its config.yaml, here it is 7" in said and said.count("\n") == 1


def test_resume_goes_on_with_what_is_in_the_folder(east_run, capsys):
    assert main(["train", "--resume", "--out", str(east_run)]) == 0
    assert "of epoch" in capsys.readouterr().out
    assert main(["train", "--resume", "--momentum", "0.5", "--out", str(east_run)]) == 2
    assert "--momentum is 0.9 in its config.yaml, here it is 0.5" in capsys.readouterr().err


def test_a_run_says_what_it_will_do_and_keeps_it_in_its_log(tmp_path, capsys):
    flags = "--model resnet20 --width 8 --method rigl --density 0.0005 --epochs 2 --limit 160 --threads 1".split()
    assert main(["train", *flags, "--device", "cpu", "--out", str(tmp_path / "r")]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["network", "method", "data", "schedule", "engine"]
    assert "resnet20 with 67,848 maskable weights, " in lines[0] and lines[0].endswith(" 0 on a path")
    assert "images for training" in lines[2] and "359 for the test; 1x16x16, 10 classes" in lines[2]
    assert "dead: no active weight lies on a path" in out and "try +connected" in out
    log = (tmp_path / "r" / "log.txt").read_text().splitlines()
    assert set(lines) < set(log) and sum("computes a constant" in line for line in log) == 1


def test_a_long_epoch_is_not_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("east_plugins.training.progress.SILENCE", 0.0)
    monkeypatch.setattr("east_plugins.training.progress.FIRST_SECONDS", 0.0)
    flags = "--model cnn --width 4 --method set --density 0.2 --epochs 1 --batch-size 32 --threads 1".split()
    assert main(["train", *flags, "--device", "cpu", "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"^about \S+ \S+ by the first 10 steps$", said, re.M)
    assert re.search(r"^epoch 1/1  step 20/\d+  loss \d\.\d+  train \S+  \S+ \S+ left$", said, re.M)


@pytest.mark.parametrize(
    "seconds, words", [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (11100, "3 h 05 min")]
)
def test_durations_are_in_the_words_people_use(seconds, words):
    assert duration(seconds) == words


def test_damaged_runs_are_refused_in_one_line(east_run, tmp_path):
    for damage in ("config.yaml", "summary.json", "checkpoint.pt"):
        folder = tmp_path / damage
        folder.mkdir()
        for name in ("config.yaml", "summary.json", "checkpoint.pt"):
            content = (east_run / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2] if name == damage else content)
        if damage == "config.yaml":
            (folder / damage).write_text("method: [")
        with pytest.raises(UsageError) as error:
            runs.load_run(folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="no run directory"):
        runs.load_run(tmp_path)


def test_checkpoints_hold_plain_values_only(east_run):
    state = torch.load(east_run / "checkpoint.pt", weights_only=True)
    assert {"model", "optimizer", "scheduler", "host", "best", "epoch", "rng"} <= set(state)


def trainer_on(device, out):
    options = from_flags({"model": "cnn", "method": "rigl", "density": 0.2, "limit": 60, "epochs": 1, "device": device})
    return Trainer(options, out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_resumed_run_draws_the_same_numbers_on_cuda(tmp_path):
    trainer = trainer_on("cuda", tmp_path)
    torch.cuda.manual_seed(5)
    trainer.save()
    runs.write_config(tmp_path, trainer.options)
    drawn = torch.rand(3, device="cuda")
    trainer_on("cuda", tmp_path).restore()
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_checkpoints_hold_the_random_state_of_a_cuda_device(tmp_path, monkeypatch):
    trainer, state, restored = trainer_on("cpu", tmp_path), torch.arange(16, dtype=torch.uint8), []
    runs.write_config(tmp_path, trainer.options)
    trainer.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *args: restored.append(args))
    trainer.save()
    load = runs.load_checkpoint
    monkeypatch.setattr(runs, "load_checkpoint", lambda path, device: load(path))
    trainer.restore()
    assert torch.equal(restored[0][0], state) and restored[0][1] == trainer.device


def test_commands_and_help(capsys):
    assert main([]) == 2 and main(["--help"]) == 0 and main(["trian"]) == 2
    assert "did you mean train" in capsys.readouterr().err
    for command in ("train", "compare", "info", "bench step"):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0
    assert main(["plugins"]) == 0
    assert "momentum_neuron" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"east_plugins {__version__}\n"


@pytest.mark.parametrize("transform", ["share", "dctps"])
def test_the_registered_transforms_can_be_named(transform, capsys):
    assert main(["info", *"--model resnet20 --width 4 --density 0.2 --json --transform".split(), transform]) == 0


def test_info_prints_one_object(capsys):
    assert main("info --model resnet34 --classes 100 --density 0.0005 --east-share --east-dyrelu --json".split()) == 0
    report = json.loads(capsys.readouterr().out)
    keys = {"parameters", "parameter_mib", "stored_mib", "maskable", "nonzeros", "dense_macs", "sparse_macs", "layers"}
    assert keys <= set(report)
    assert f"{report['parameter_mib']:.2f}" == "54.96"
    assert report["nonzeros"] == round(0.0005 * report["maskable"]) >= report["effective_density"] * report["maskable"]


@pytest.mark.parametrize(
    "flags, channels, size",
    [
        ("--data digits", 1, 16),
        ("--data mnist", 1, 28),
        ("--data cifar100", 3, 32),
        ("", 3, 32),
        ("--data folder", 3, 32),
        ("--data digits --image-size 8 --channels 2", 2, 8),
    ],
)
def test_info_counts_images_as_the_data_has_them(flags, channels, size, capsys):
    common = "info --model resnet20 --width 4 --density 0.2 --json".split()
    macs = []
    classes = 100 if "cifar100" in flags else 10
    for line in (flags, f"--classes {classes} --channels {channels} --image-size {size}"):
        assert main([*common, *line.split()]) == 0
        macs.append(json.loads(capsys.readouterr().out)["dense_macs"])
    assert macs[0] == macs[1]


def test_info_refuses_data_that_there_is_not(capsys):
    assert main("info --data nonsense".split()) == 2
    assert "unknown --data 'nonsense'" in capsys.readouterr().err


def test_info_describes_the_method_of_its_config(tmp_path, capsys):
    shared = []
    for line in ("method: rigl+share", "method: rigl", "east-share: true"):
        (tmp_path / "c.yaml").write_text(f"{line}\nmodel: resnet20\nwidth: 4\ndensity: 0.05\n")
        assert main(["info", "--config", str(tmp_path / "c.yaml"), "--json"]) == 0
        shared.append(json.loads(capsys.readouterr().out)["parameters"])
    assert shared[0] == shared[2] < shared[1]


def test_bench_reports_ratios(capsys):
    common = ["--model", "cnn", "--density", "0.05", "--repeats", "2", "--json"]
    for what, ratio in (
        (["step", "--batch-size", "4", "--masks", "trained"], "dense_over_sparse"), (["step"], "host_over_optimizer"),
        (["update"], "update_over_optimizer"),
    ):  # fmt: skip
        assert main(["bench", *what, *common]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["ratios"][ratio] > 0 and report["threads"] >= 1
        if what[0] == "step":
            masked, ours = (report["memory_mib"][name] for name in ("masked", "ours, sparse"))
            assert 0 < 5 * ours["optimizer_state"] < masked["optimizer_state"]
            assert ours["kept_for_backward"] > 0
        assert {"name", "median_ms", "min_ms", "max_ms"} == set(report["rows"][0])


@pytest.mark.parametrize("flag", ["--batch-size", "--classes", "--threads", "--repeats"])
def test_bench_refuses_what_cannot_be_counted(flag, capsys):
    for value in ("0", "-1"):
        assert main(["bench", "step", "--model", "cnn", flag, value]) == 2
        assert capsys.readouterr().err == f"east_plugins: {flag} must be at least 1, got {value}\n"


@pytest.mark.parametrize("what", ["step", "update"])
@pytest.mark.parametrize("device", ["cuda:99", "foo"])
def test_bench_refuses_a_device_that_is_not_there(what, device, capsys):
    assert main(["bench", what, "--model", "cnn", "--device", device]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"east_plugins: --device {device} cannot be used") and said.count("\n") == 1


@pytest.mark.parametrize(
    "flags, key, value",
    [
        ("--model resnet34 --classes 100", "parameters", 21_328_292),
        ("--model resnet34 --classes 100", "parameter_mib", 81.36),
        ("--model resnet34 --classes 100 --east-share", "parameter_mib", 42.83),
        ("--model resnet34 --classes 100 --east-share --east-dyrelu", "parameter_mib", 54.96),
        ("--model resnet34 --classes 100 --dctps", "stored_mib", 162.66),
        ("--model resnet50", "dense_macs", 1_297_829_888),
        ("--model resnet50 --east-share", "parameters", 13_981_282),
        ("--model resnet50 --dctps --density 0.0005", "sparse_macs", 40.26),
        ("--model resnet50 --dctps --density 0.0001", "sparse_macs", 39.09),
    ],
)
def test_info_gives_the_papers_numbers(flags, key, value, capsys):
    assert main(["info", *flags.split(), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)[key]
    assert got == value if isinstance(value, int) else f"{got / (1 if 'mib' in key else 1e6):.2f}" == f"{value:.2f}"


def test_info_times_dctps_beside_plain_layers(capsys):
    assert main("info --model resnet20 --width 4 --density 0.05 --dctps --latency --json".split()) == 0
    report = json.loads(capsys.readouterr().out)["latency"]
    assert report["ratios"]["dctps_over_plain"] > 0
    assert main("info --model resnet20 --latency".split()) == 2
    assert "--latency needs --dctps" in capsys.readouterr().err


def test_a_compiled_network_and_the_sparse_engine_exclude_each_other(tmp_path, capsys):
    assert train(tmp_path / "r", "--compile", "--engine", "sparse") == 2
    assert "--compile" in capsys.readouterr().err and not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a compiler")
def test_a_compiled_network_trains_as_the_plain_one(tmp_path):
    """Also through DyReLU's three phases."""
    losses = []
    for flags in ({"compile": True}, {"engine": "dense"}):
        options = from_flags({"model": "cnn", "method": "rigl+dyrelu", "width": 8, "density": 0.1, "limit": 300,
                              "epochs": 5, "device": "cpu", **flags})  # fmt: skip
        out = tmp_path / str(len(losses))
        train_run(options, out, quiet=True)
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("engine", ["sparse", "dense"])
def test_the_recipe_of_the_authors_code_trains(engine, tmp_path):
    flags = "--method east --recipe es2 --epochs 8 --east-cyclic-length 2 --east-cyclic-update-frequency 2".split()
    assert train(tmp_path / "r", *flags, "--engine", engine) == 0
    summary, lines = runs.read_summary(tmp_path / "r"), runs.read_metrics(tmp_path / "r")
    assert summary["best_epoch"] == 8 and summary["method"] == "east"
    config = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())
    assert (config["clip-norm"], config["east-cyclic-open"], config["sparse-init"]) == (1.0, True, "ERK-floor")
    assert lines[-1]["nonzeros"] == summary["nonzeros"] > 0.05 * summary["maskable"]  # nothing closes the cycles
    assert not any("fc.bias" in name for name in torch.load(tmp_path / "r" / "checkpoint.pt")["best"]["model"])


@pytest.mark.slow
def test_the_checkpoint_of_a_large_sparse_network_is_small(tmp_path):
    options = from_flags({"method": "rigl+connected", "model": "resnet34", "density": 0.001, "epochs": 2, "limit": 300})
    train_run(options, tmp_path, quiet=True)
    assert (tmp_path / runs.CHECKPOINT).stat().st_size < 3_000_000


class Unread:
    """Test images that nobody may look at."""

    def to(self, device):
        return self

    def __len__(self):
        return 7

    def __getattr__(self, name):
        raise AssertionError(f"the test set was read: {name}")


@pytest.mark.parametrize("method", METHODS)
def test_no_method_reads_the_test_set_before_the_end(method, tmp_path):
    short = dict(model="resnet20", width=4, data="digits", limit=160, epochs=6, batch_size=8, threads=1, engine="dense")
    options = Config(method=method, **short, density=None if method == "dense" else 0.08)
    data = dataclasses.replace(runs.load_data(options), test=Unread())
    trainer = Trainer(options, tmp_path, data)
    with caught() as interrupt, Progress(trainer, quiet=True) as progress:
        while trainer.epoch < trainer.options.epochs:
            trainer.run_epoch(interrupt, progress)
    with pytest.raises(AssertionError, match="the test set was read"):
        trainer.finish()
