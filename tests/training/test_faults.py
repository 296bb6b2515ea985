"""What happens to real runs: processes that are told to end or killed, damaged files, two writers, a full disk."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from east_plugins import Config, train
from east_plugins.__main__ import main
from east_plugins.errors import EastError, UsageError
from east_plugins.ops import files
from east_plugins.training import runs

FLAGS = ("--method east --model resnet20 --width 8 --data digits --limit 300 --density 0.05 --epochs 4 --batch-size 32 "
         "--engine sparse --threads 1 --east-cyclic-update-frequency 2 --save-every 0").split()  # fmt: skip


def start(out, *more, flags=FLAGS, command="train", **options):
    words = [sys.executable, "-m", "east_plugins", command, *flags, *more, "--out", str(out)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, **options)


def until(what, seconds=120):
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.02)


def outcome(folder):
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    summary = json.loads((folder / runs.SUMMARY).read_text())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines], summary["weights_sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    assert main(["train", *FLAGS, "--quiet", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A run with two checkpoints, cut off in the third epoch."""
    out, save = tmp_path_factory.mktemp("faults") / "run", runs.save_checkpoint
    count = iter(range(10**6))

    def cut(path, state):
        save(path, state)
        if next(count) == 24:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "save_checkpoint", cut)
        assert main(["train", *FLAGS, "--quiet", "--out", str(out)]) == 130
    return out


@pytest.fixture
def stopped(cut_off, tmp_path):
    """A copy of it."""
    return shutil.copytree(cut_off, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_told_to_end_saves_and_goes_on_bit_for_bit(number, whole, tmp_path):
    run = start(tmp_path / "run")
    until(lambda: (tmp_path / "run" / runs.CHECKPOINT).exists())
    run.send_signal(number)
    assert "go on with --resume" in run.communicate()[1] and run.returncode == 130
    assert main(["train", "--resume", "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def killed_again_and_again(times, out, *more):
    """Kills a run at random moments, and starts it again each time; then lets it end."""
    chance = random.Random(0)
    for _ in range(times):
        run = start(out, "--resume", *more)
        until(lambda run=run: (out / ".lock").exists() or run.poll() is not None)
        time.sleep(chance.uniform(0, 1.5))
        run.kill()
        run.communicate()
    run = start(out, "--resume", *more)
    error = run.communicate()[1]
    assert run.returncode == 0, error


def test_a_run_that_is_killed_at_random_ends_as_the_undisturbed_one(whole, tmp_path):
    killed_again_and_again(3, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "engine"), [(30, "sparse"), (10, "auto"), (10, "dense")])
def test_a_run_that_is_killed_many_times_ends_as_the_undisturbed_one(times, engine, tmp_path):
    words = ["--engine", engine]
    run = start(tmp_path / "whole", *words)
    assert run.communicate() and run.returncode == 0
    killed_again_and_again(times, tmp_path / "run", *words)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_damaged_checkpoints_are_passed_over_for_the_one_before(stopped, whole, tmp_path, caplog):
    (stopped / runs.CHECKPOINT).write_bytes((stopped / runs.CHECKPOINT).read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 0
    assert runs.PREVIOUS in caplog.text and outcome(stopped) == outcome(whole)


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_no_damaged_checkpoint_is_taken(how, stopped, tmp_path):
    content, generator = (stopped / runs.CHECKPOINT).read_bytes(), np.random.default_rng(0)
    good = runs.load_checkpoint(stopped / runs.CHECKPOINT)
    file = tmp_path / "damaged.pt"
    for _ in range(100):
        place = int(generator.integers(len(content)))
        damaged = bytearray(content[:place] if how == "cut" else content)
        if how == "flipped":
            damaged[place] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        try:
            read = runs.load_checkpoint(file)
        except UsageError as error:
            assert "\n" not in str(error)
        else:
            assert how == "flipped" and same(read, good)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


WRONG = {
    "no field": lambda s: s.pop("host"), "epoch": lambda s: s.update(epoch=-1), "far": lambda s: s.update(epoch=99),
    "step": lambda s: s.update(step_in_epoch=10**6), "kind": lambda s: s.update(epoch="2"),
    "weights": lambda s: s["model"]["conv1.weight"].fill_(float("nan")), "beta": lambda s: s.update(beta="x"),
    "model": lambda s: s.update(model={}), "optimizer": lambda s: s.update(optimizer=[]),
    "masks": lambda s: s["host"].update(masks={}), "totals": lambda s: s.update(totals={"loss": 1.0, "x": 2}),
    "generator": lambda s: s.update(epoch_generator=torch.zeros(3)), "images": lambda s: s.update(data=1),
    "sums": lambda s: s.update(totals=3), "values": lambda s: s.update(model=[1]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_cannot_be_is_one_line(what, stopped, capsys):
    state = runs.load_checkpoint(stopped / runs.CHECKPOINT)
    WRONG[what](state)
    (stopped / runs.PREVIOUS).unlink()
    files.save_checkpoint(stopped / runs.CHECKPOINT, state)
    assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("state", [{}, [], 3, {"a": torch.ones(2)}], ids=str)
def test_a_file_that_is_no_checkpoint_is_one_line(state, stopped, capsys):
    for name in (runs.CHECKPOINT, runs.PREVIOUS):
        torch.save(state, stopped / name)
    assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("east_plugins: ")


def test_two_processes_on_one_folder(tmp_path):
    first = start(tmp_path / "run", "--epochs", "4000")  # until it is told to end
    until(lambda: (tmp_path / "run" / runs.CHECKPOINT).exists())
    second = start(tmp_path / "run", "--resume", "--epochs", "4000")
    assert f"is in use by process {first.pid}" in second.communicate()[1] and second.returncode == 2
    first.terminate()
    assert "stopped" in first.communicate()[1]
    assert not (tmp_path / "run" / ".lock").exists()


def test_several_ranks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        train(Config(model="cnn", width=4, epochs=1, density=0.3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_loads(stopped, monkeypatch, capsys):
    def full(state, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    before = (stopped / runs.CHECKPOINT).read_bytes()
    assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 2
    assert "No space left on device; the checkpoint before it is whole" in capsys.readouterr().err
    assert (stopped / runs.CHECKPOINT).read_bytes() == before and not list(stopped.glob(".*part*"))
    assert runs.load_checkpoint(stopped / runs.CHECKPOINT)["epoch"] == 2


def test_a_disk_that_is_really_full_is_one_line_and_the_checkpoint_loads(whole):
    """A small tmpfs in a namespace of its own, where the system lets us have one."""
    script = f"""set -e
place=$(mktemp -d); mount -t tmpfs -o size=1500k none "$place"; mkdir "$place/run"
cp {whole}/config.yaml {whole}/{runs.CHECKPOINT} "$place/run/"
head -c 100m /dev/zero > "$place/filler" 2>/dev/null || true
{sys.executable} -m east_plugins train --resume --quiet --save-every 0 --epochs 4 --out "$place/run" && exit 9
rm "$place/filler"
{sys.executable} -m east_plugins analyze "$place/run" --images 10 > /dev/null || exit 8
"""
    done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no tmpfs of one's own here")
    assert done.returncode == 0 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_where_asked(tmp_path, capsys, monkeypatch):
    flags = "--method rigl --model cnn --width 4 --data digits --limit 100 --density 0.3 --epochs 3".split()
    right, calls, out = torch.nn.functional.cross_entropy, iter(range(10**6)), tmp_path / "run"

    def wrong(output, y):
        return right(output, y) * (float("inf") if next(calls) == 2 else 1)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", wrong)
    words = ["--batch-size", "32", "--save-every", "0", "--on-nonfinite", "stop", "--quiet"]
    assert main(["train", *flags, *words, "--out", str(out)]) == 2
    assert "epoch 1, step 3: the loss is inf" in capsys.readouterr().err
    kept = runs.load_checkpoint(out / runs.CHECKPOINT)
    assert (kept["epoch"], kept["step_in_epoch"]) == (0, 2)
    assert all(bool(value.isfinite().all()) for value in kept["model"].values())


def test_a_comparison_goes_on_after_a_run_that_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "failing.py").write_text("def rule(layer):\n    raise RuntimeError('a fault of its own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--model cnn --width 4 --data digits --limit 100 --sparsities 0.7 --epochs 2 --threads 1".split()
    command = [
        "compare",
        "--methods",
        "rigl,static",
        "--growth",
        "failing:rule",
        *flags,
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said and "a fault of its own" in said
    assert "static" in (tmp_path / "runs/table.md").read_text()


def test_a_comparison_whose_parent_is_killed_leaves_no_worker(tmp_path):
    words = "--methods rigl,set --model resnet20 --width 8 --data digits --sparsities 0.9 --epochs 40 --jobs 2".split()
    parent = start(tmp_path, "--threads", "1", flags=words, command="compare")
    until(lambda: len(list(tmp_path.glob("*/.lock"))) == 2)
    parent.kill()
    parent.communicate()
    until(lambda: not list(tmp_path.glob("*/.lock")))
    assert all((tmp_path / f"{method}-0.9-seed0" / runs.CHECKPOINT).exists() for method in ("rigl", "set"))
    shutil.rmtree(tmp_path)


def test_a_dead_worker_of_a_comparison_is_tried_again(tmp_path):
    words = "--methods rigl,set --model cnn --width 4 --data digits --sparsities 0.7 --epochs 12 --jobs 2".split()
    parent = start(tmp_path, "--threads", "1", flags=words, command="compare")
    lock = tmp_path / "rigl-0.7-seed0/.lock"
    until(lambda: lock.exists() and lock.read_text())
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    error = parent.communicate()[1]
    assert parent.returncode == 0, error
    assert all(name in (tmp_path / "table.md").read_text() for name in ("rigl", "set"))


def test_a_lock_whose_holder_is_dead_is_no_lock(tmp_path):
    (tmp_path / files.LOCK).write_text("process 1 on a machine that is gone")
    with files.locked(tmp_path), pytest.raises(UsageError, match=f"process {os.getpid()}"), files.locked(tmp_path):
        pass
    assert not (tmp_path / files.LOCK).exists()


def test_what_cannot_be_written_says_where(tmp_path):
    with pytest.raises(EastError, match="cannot be written"):
        files.save_checkpoint(tmp_path / "no folder" / "a.pt", {})
