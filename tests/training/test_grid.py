"""Comparisons over a grid file, on devices and clusters, and runs that stop after some steps."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from east_plugins import Config
from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.training import pool, runs
from east_plugins.training.jobs import Job, jobs
from east_plugins.training.watch import Watch

TINY = "data: digits\nlimit: 120\nmodel: cnn\nwidth: 4\nbatch-size: 60\nepochs: 2\ndevice: cpu\nthreads: 1\n"


@pytest.fixture
def grid(tmp_path):
    def written(text, base=TINY):
        (tmp_path / "tiny.yaml").write_text(base)
        (tmp_path / "grid.yaml").write_text("base: tiny.yaml\n" + text)
        return str(tmp_path / "grid.yaml")

    return written


def names(found):
    return [job.out.name for job in found]


def test_a_grid_is_the_product_of_its_lists_and_runs_are_named_by_what_varies(grid):
    config = grid(
        "grid:\n  method: [set, rigl]\n  density: [0.2, 0.1]\n  lr: [0.1, 0.05]\n  epochs: 3\n  seed: [0, 1]\n"
    )
    found = jobs(None, None, None, Path("c"), {"config": config})
    assert len(found) == len(set(names(found))) == 16
    assert names(found)[:2] == ["set-0.8-lr=0.1-seed0", "set-0.8-lr=0.1-seed1"]
    assert {(j.options.lr, j.options.epochs, j.options.seed) for j in found} == {
        (lr, 3, seed) for lr in (0.1, 0.05) for seed in (0, 1)
    }
    assert {job.options.density for job in found} == {0.2, 0.1}


def test_blocks_of_a_grid_are_joined(grid):
    config = grid(
        "method: rigl+cyclic\ngrid:\n- method: rigl\n"
        "- east-cyclic-pattern: [cosine, triangular]\n  east-cyclic-cycles: 1\n"
        "- east-cyclic-pattern: [cosine]\n  east-cyclic-cycles: 2\n  east-cyclic-length-mult: [1, 2]\n"
    )
    found = jobs(None, [0.9], [0], Path("c"), {"config": config})
    assert names(found) == [
        "rigl-0.9-seed0",
        "rigl+cyclic-0.9-cyclic-pattern=cosine-cyclic-cycles=1-seed0",
        "rigl+cyclic-0.9-cyclic-pattern=triangular-cyclic-cycles=1-seed0",
        "rigl+cyclic-0.9-cyclic-pattern=cosine-cyclic-cycles=2-cyclic-length-mult=1-seed0",
        "rigl+cyclic-0.9-cyclic-pattern=cosine-cyclic-cycles=2-cyclic-length-mult=2-seed0",
    ]
    assert found[0].options.east.cyclic is None and found[-1].options.east.cyclic_length_mult == 2


def test_what_is_given_goes_before_the_grid_and_names_stay(grid):
    config = grid("grid: {method: [set, rigl], sparsity: [0.8, 0.9], model: [cnn, mlp], seed: [0, 1]}\n")
    whole = jobs(None, None, None, Path("c"), {"config": config})
    part = jobs(["rigl"], [0.9], [1], Path("c"), {"config": config, "model": "mlp"})
    assert names(part) == ["rigl-0.9-model=mlp-seed1"] and set(names(part)) < set(names(whole))
    assert part[0].options == next(job.options for job in whole if job.out == part[0].out)


def test_blocks_that_flags_make_the_same_are_run_once(grid):
    config = grid("method: set\ndensity: 0.1\ngrid: [{lr: [0.1, 0.2]}, {lr: 0.3, seed: [0, 1]}]\n")
    assert len(jobs(None, None, None, Path("c"), {"config": config})) == 4
    assert names(jobs(None, None, [0], Path("c"), {"config": config, "lr": 0.5})) == ["set-0.9-lr=0.5-seed0"]


def test_a_file_without_a_grid_leaves_the_defaults(grid):
    found = jobs(None, None, None, Path("c"), {"config": grid("")})
    assert len(found) == 6 and {job.method for job in found} == {"set", "rigl", "east"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("grid: 3", "grid must hold keys and lists"), ("grid: []", "grid is empty"), ("grid: {lr: []}", "lr of grid"),
        ("grid: {lr: [0.1, 0.1]}", "lr of grid must differ, got 0.1 twice"), ("grid: {rl: [1]}", "unknown key 'rl'"),
        ("grid: {sparsity: [1.5]}", "sparsity of its grid must be in [0, 1), got 1.5"),
        ("grid: {seed: [a]}", "seed of grid"), ("grid: {density: [0.1], sparsity: [0.9]}", "density and sparsity"),
        ("grid: {lr: [fast]}", "grid.yaml: --lr: invalid float value"),
        ("grid: {config: [x]}", "config"), ("grid: {method: [rigel]}", "rigel"),
        ("grid: {lr: [-1]}", "lr of"), ("grid: [{seed: [0]}, {seed: [0]}]", "its grid has set-0.9-seed0 twice"),
        ("grid: {seed: [" + ",".join(map(str, range(200))) + "], lr: [" + ",".join(map(str, range(1, 99))) + "]}",
         "grid has 19,600 runs"), ("grid: {base: [tiny.yaml]}", "unknown key 'base'"),
    ],
)  # fmt: skip
def test_a_grid_that_cannot_be_is_one_line_and_starts_nothing(text, words, grid, tmp_path, capsys):
    config = grid(f"method: set\ndensity: 0.1\n{text}\n")
    assert main(["compare", "--config", config, "--out", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "c").exists()


def test_train_takes_one_run_of_a_grid(grid, tmp_path, capsys):
    config = grid("method: rigl\ngrid: {density: [0.2, 0.1], lr: [0.1, 0.05], seed: [3]}\n")
    command = ["train", "--config", config, "--quiet", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "is a grid of runs: compare runs them all; for one of them choose --lr, --density" in capsys.readouterr().err
    assert main([*command, "--density", "0.2", "--lr", "0.05", "--limit-steps", "1"]) == 0
    found = runs.read_config(tmp_path / "run")
    assert (found.density, found.lr, found.seed) == (0.2, 0.05, 3)


def test_the_table_of_a_grid_has_a_column_for_what_varies_and_time_is_told(grid, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("east_plugins.training.watch.SILENCE", 0.01)
    config = grid("method: static\ngrid: {density: [0.2, 0.1], width: [4, 6]}\n")
    assert main(["compare", "--config", config, "--out", str(tmp_path / "c")]) == 0
    table = (tmp_path / "c" / "table.md").read_text().splitlines()
    assert table[2] == "| method | width | 80 % | 90 % |"
    assert [line.split(" | ")[:2] for line in table[4:]] == [["| static", "4"], ["| static", "6"]]
    with open(tmp_path / "c" / "table.csv") as file:
        assert [(row["width"], row["sparsity"]) for row in csv.DictReader(file)] == [
            ("4", "0.8"), ("4", "0.9"), ("6", "0.8"), ("6", "0.9"),
        ]  # fmt: skip
    assert "of 4 finished, about" in capsys.readouterr().err


def test_the_time_left_is_by_runs_of_the_same_kind(tmp_path):
    def job(model, name):
        return Job("set", 0.9, 0, Config(method="set", model=model, epochs=10), tmp_path / name)

    todo = [job("cnn", "a"), job("cnn", "b"), job("mlp", "c")]
    assert Watch(todo, print).state() == "starting"
    for name, epochs, seconds in (("a", 10, 100.0), ("b", 5, 50.0), ("c", 1, 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / runs.CONFIG).touch()
        (tmp_path / name / runs.METRICS).write_text((json.dumps({"seconds": seconds}) + "\n") * epochs)
    (tmp_path / "a" / runs.SUMMARY).touch()
    assert "1 of 3 finished, about 59 s left in all" in Watch(todo, print).state()  # 5 epochs of 10 s, 9 of 1 s
    assert "about 50 s left" in Watch(todo, print, workers=2).state()  # the longest one is not shared out


def test_a_smoke_run_says_that_it_is_one_and_goes_on(tmp_path, capsys):
    flags = "--method rigl --model cnn --width 4 --data digits --limit 120 --batch-size 30 --epochs 2".split()
    flags += "--density 0.3 --threads 1 --update-frequency 2 --engine dense".split()
    assert main(["train", *flags, "--limit-steps", "3", "--out", str(tmp_path / "a")]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("unfinished: stopped by --limit-steps after 3 of 8 steps, nothing was tested; loss ")
    assert "2 epochs of 4 steps, of which the first 3 alone are run" in told.err
    assert not (tmp_path / "a" / runs.SUMMARY).exists()
    assert main(["analyze", str(tmp_path / "a")]) == 0
    assert main(["export", str(tmp_path / "a"), "--format", "c", "--out", str(tmp_path / "a.c")]) == 2
    assert "unfinished run" in capsys.readouterr().err
    assert main(["train", "--resume", "--quiet", "--out", str(tmp_path / "a")]) == 0
    assert main(["train", *flags, "--quiet", "--out", str(tmp_path / "b")]) == 0
    digests = [runs.read_summary(tmp_path / name)["weights_sha256"] for name in "ab"]
    assert digests[0] == digests[1]


def test_a_runs_folder_says_what_inputs_and_outputs_are(tmp_path):
    words = "--method rigl --model cnn --width 4 --data digits --limit 120 --density 0.3 --threads 1 --limit-steps 1"
    assert main(["train", *words.split(), "--quiet", "--out", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / runs.DATA).read_text())
    assert found["classes"] == [str(i) for i in range(10)] and found["input_shape"] == [1, 16, 16]
    assert found["images"]["train"] + found["images"]["validation"] == 120 and found["images"]["test"] == 359
    train = runs.load_data(runs.read_config(tmp_path / "a")).train
    assert found["mean"] == pytest.approx(train.mean.flatten().tolist(), abs=1e-6)
    assert found["std"] == pytest.approx(train.std.flatten().tolist(), abs=1e-6)


def test_smoke_runs_stand_in_the_table_as_unfinished(grid, tmp_path, capsys):
    config = grid("method: static\ngrid: {density: [0.2, 0.1], seed: [0, 1]}\n")
    command = ["compare", "--config", config, "--out", str(tmp_path / "c")]
    assert main([*command, "--limit-steps", "1"]) == 0
    table = (tmp_path / "c" / "table.md").read_text()
    assert "| static | unfinished | unfinished |" in table and "unfinished: stopped by `--limit-steps`" in table
    assert "static           sparsity 0.8  seed 0  unfinished, 1 of 4 steps" in capsys.readouterr().err
    assert main(command) == 0
    assert "unfinished" not in (tmp_path / "c" / "table.md").read_text()


@pytest.mark.parametrize("device", [None, "cuda"])
def test_runs_are_spread_over_the_gpus_of_a_machine(device):
    names = pool.devices(Config(device=device), 3)
    assert names == ["cuda:0", "cuda:1", "cuda:2"]
    running = []
    for _ in range(6):
        running.append(pool.least_busy(names, running))
    assert running == names * 2
    running.remove("cuda:1")
    assert pool.least_busy(names, running) == "cuda:1"


@pytest.mark.parametrize("device, count", [("cpu", 4), ("cuda:1", 4), (None, 1), (None, 0)])
def test_a_device_that_is_named_or_the_only_one_stays(device, count):
    assert pool.devices(Config(device=device), count) == [device]


class Here:
    """A pool that runs what is submitted at once, and keeps on which device."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, options, out):
        from concurrent.futures import Future

        future = Future()
        future.set_result({"device": options.device})
        return future


def test_every_run_is_told_its_device(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Here)
    todo = [Job("set", 0.9, seed, Config(method="set", seed=seed), tmp_path / str(seed)) for seed in range(2)]
    assert {found["device"] for _, found in pool.run(todo, 2)} == {"cuda:0", "cuda:1"}


def test_a_missing_ray_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["compare", "--backend", "ray", "--out", str(tmp_path / "c")]) == 2
    assert "--backend ray needs Ray: pip install 'east_plugins[ray]'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="must be one of local, ray"):
        from east_plugins import compare

        compare(["set"], [0.9], tmp_path / "c", backend="slurm")


FLAGS = "--methods rigl,set --sparsities 0.8 --seeds 0,1 --model cnn --width 4 --data digits --limit 300"
FLAGS += " --epochs 30 --batch-size 32 --engine dense --threads 1 --save-every 0 --update-frequency 20"


def start(out, *more):
    command = [sys.executable, "-m", "east_plugins", "compare", *FLAGS.split(), *more, "--out", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for(what):
    ends = time.monotonic() + 600  # a busy machine takes minutes to start a cluster
    while not what():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(["compare", *FLAGS.split(), "--out", str(out)]) == 0
    return (out / "table.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--jobs 2", "--backend ray --jobs 2"])
def test_a_comparison_that_is_killed_and_started_again_gives_the_table_of_an_undisturbed_one(
    more, undisturbed, tmp_path
):
    if "ray" in more:
        pytest.importorskip("ray")
    first = start(tmp_path, *more.split())
    wait_for(lambda: list(tmp_path.glob("*/summary.json")) or first.poll() is not None)
    wait_for(lambda: len(list(tmp_path.glob("*/checkpoint.pt"))) > 1 or first.poll() is not None)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert len(list(tmp_path.glob("*/summary.json"))) < 4
    second = start(tmp_path, *more.split())
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert (tmp_path / "table.csv").read_text() == undisturbed


@pytest.mark.slow
def test_on_ray_one_run_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    (tmp_path / "failing.py").write_text("def rule(layer):\n    raise RuntimeError('a fault of its own')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flags = "--model cnn --width 4 --data digits --limit 100 --sparsities 0.7 --epochs 2 --threads 1".split()
    words = ["--methods", "rigl,static", "--growth", "failing:rule", "--backend", "ray"]
    assert main(["compare", *words, *flags, "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "1 of 2 runs failed" in said and "a fault of its own" in said
    assert "static" in (tmp_path / "runs/table.md").read_text()
