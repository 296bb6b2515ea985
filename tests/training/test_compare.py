import csv
import os
import signal
import subprocess
import sys
import time

import pytest

from east_plugins.__main__ import main
from east_plugins.errors import Interrupted
from east_plugins.training import datasets, images, runs
from east_plugins.training.compare import compare as training_compare
from east_plugins.training.jobs import Job, jobs
from east_plugins.training.table import as_csv, collect, markdown

TINY = "--data digits --limit 120 --model cnn --width 4 --batch-size 60 --epochs 2 --device cpu".split()


def compare(out, *flags):
    return main(["compare", "--out", str(out), *TINY, *flags])


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_table_plot_and_resuming(jobs, tmp_path, capsys):
    flags = "--methods dense,set,rigl+dyrelu --sparsities 0.8,0.95 --seeds 0,1 --jobs".split()
    assert compare(tmp_path, *flags, jobs) == 0
    first = capsys.readouterr()
    table = (tmp_path / "table.md").read_text()
    assert table in first.out and str(tmp_path / "accuracy.png") in first.out
    assert [line.split("|")[1].strip() for line in table.splitlines()[4:]] == ["dense", "set", "rigl+dyrelu"]
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and all(row["seeds"] == "2" for row in rows)
    assert (tmp_path / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    assert len(stamps) == 10
    assert compare(tmp_path, *flags, jobs) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (tmp_path / "table.md").read_text() == table


def test_runs_one_after_another_read_their_images_once_and_are_the_same_as_alone(tmp_path, monkeypatch):
    digits, read = datasets.SOURCES["digits"], []
    counting = digits._replace(read=lambda *where: read.append(where) or digits.read(*where))
    monkeypatch.setitem(datasets.SOURCES, "digits", counting)
    assert compare(tmp_path / "c", *"--methods set --sparsities 0.8,0.9 --seeds 0,1 --jobs 1".split()) == 0
    assert read == [(None, None)] * 2  # the check beforehand, and all runs
    alone = "--method set --density 0.1 --seed 1 --threads 1 --quiet --out".split()
    assert main(["train", *TINY, *alone, str(tmp_path / "alone")]) == 0
    digests = [runs.read_summary(tmp_path / run)["weights_sha256"] for run in ("c/set-0.9-seed1", "alone")]
    assert digests[0] == digests[1]

    kept = {}
    assert images.load("digits", image_size=8, kept=kept).input_shape == (1, 8, 8)
    assert images.load("digits", image_size=16, kept=kept).input_shape == (1, 16, 16) and len(kept) == 1


def test_ctrl_c_starts_no_further_run(tmp_path):
    flags = [*TINY, *"--epochs 400 --methods set --sparsities 0.8 --seeds 0,1,2,3 --jobs 2 --out".split()]
    command = [sys.executable, "-m", "east_plugins", "compare", *flags, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped after 0 of 4 runs" in said
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["set-0.8-seed0", "set-0.8-seed1"]


def test_methods_are_themselves_whatever_run_the_config_is_of(tmp_path):
    first = "--method rigl+cyclic --density 0.2 --east-cyclic-multiplier 2 --epochs 3 --quiet --out".split()
    assert main(["train", *TINY, *first, str(tmp_path / "first")]) == 0
    flags = ["--config", str(tmp_path / "first" / "config.yaml"), "--methods", "set,snfs,rigl,dense,dense+dyrelu"]
    assert main(["compare", *flags, "--sparsities", "0.9", "--out", str(tmp_path / "c")]) == 0
    found = {folder.name: runs.read_config(folder) for folder in (tmp_path / "c").iterdir() if folder.is_dir()}
    assert {name: (options.growth, options.density) for name, options in found.items()} == {
        "set-0.9-seed0": ("random", 0.1), "snfs-0.9-seed0": ("momentum", 0.1), "rigl-0.9-seed0": ("gradient", 0.1),
        "dense-0-seed0": ("random", 1.0), "dense+dyrelu-0-seed0": ("random", 1.0),
    }  # fmt: skip
    assert not any(options.east.cyclic for options in found.values())


def test_dense_is_dense_whatever_density_the_config_has(tmp_path):
    (tmp_path / "c.yaml").write_text("density: 0.3\n")
    assert compare(tmp_path / "c", "--config", str(tmp_path / "c.yaml"), *"--methods dense --seeds 0".split()) == 0
    assert runs.read_summary(tmp_path / "c" / "dense-0-seed0")["density"] == 1


def test_dense_alone_has_a_table_too_and_one_seed_no_deviation(tmp_path, capsys):
    assert compare(tmp_path, *"--methods dense --epochs 1".split()) == 0
    caption, _, head, _, line = (tmp_path / "table.md").read_text().splitlines()
    assert caption.startswith("Test accuracy in %")
    accuracy = runs.read_summary(tmp_path / "dense-0-seed0")["test_accuracy"]
    assert head == "| method | 0 % |" and line == f"| dense | {100 * accuracy:.1f} (100%) |"
    with open(tmp_path / "table.csv") as file:
        assert [row["std"] for row in csv.DictReader(file)] == [""]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--methods set,rigel", "did you mean rigl"),
        ("--methods set,granet+cyclic", "--density-schedule gradual"),
        ("--sparsities 1", "--sparsities"),
        ("--sparsities nan,nan", "--sparsities must be in [0, 1), got nan"),
        ("--sparsities some", "--sparsities must be numbers"),
        ("--seeds 1.5", "--seeds must be numbers"),
        ("--seeds 0,1,0", "--seeds must differ, got 0 twice"),
        ("--methods set,rigl,set", "--methods must differ, got set twice"),
        ("--sparsities 0.9,0.90", "--sparsities must differ, got 0.9 twice"),
        ("--sparsities 0.99999991,0.99999992", "--sparsities must differ, got 1 twice"),
        ("--jobs 0", "--jobs"),
        ("--density 0.1", "--density cannot be given"),
    ],
)
def test_wrong_input_starts_nothing(flags, words, tmp_path, capsys):
    assert compare(tmp_path / "c", *flags.split()) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_refusal_of_one_run_comes_before_all_runs(tmp_path, capsys):
    assert compare(tmp_path / "c", "--methods", "set,rigl+share", "--sparsities", "0.9") == 2
    assert "--east-share" in capsys.readouterr().err


def test_another_run_in_the_folder_is_found_before_all_runs(tmp_path, capsys):
    flags = "--methods set --sparsities 0.8 --seeds 0,1".split()
    assert compare(tmp_path, *flags) == 0
    for path in (*tmp_path.glob("*/summary.json"), *(tmp_path / "set-0.8-seed0").glob("*")):
        path.unlink(missing_ok=True)
    capsys.readouterr()
    assert compare(tmp_path, *flags, "--lr", "0.03") == 2
    said = capsys.readouterr().err
    assert (
        said.startswith(f"east_plugins: --out {tmp_path / 'set-0.8-seed1'} holds another run: --lr is 0.1 ")
        and said.count("\n") == 1
    )
    assert not list((tmp_path / "set-0.8-seed0").iterdir())


def test_missing_matplotlib_is_said_before_all_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare(tmp_path / "c", "--methods", "set") == 2
    assert "needs matplotlib" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_cells_are_mean_and_deviation_over_seeds(tmp_path):
    def summary(accuracy):
        return {"test_accuracy": accuracy, "effective_density": 0.0005, "density": 0.001}

    jobs = [Job("rigl", 0.999, seed, None, tmp_path) for seed in (0, 1, 2)]
    rows = collect([(job, summary(accuracy)) for job, accuracy in zip(jobs, (0.5, 0.6, 0.7), strict=True)])
    assert rows[0].mean == pytest.approx(0.6) and rows[0].spread == pytest.approx(0.1)
    assert "| rigl | 60.0 +- 10.0 (50%) |" in markdown(rows)


def test_dead_and_diverged_runs_are_marked_with_what_to_try(tmp_path):
    def pair(method, seed, effective, diverged):
        summary = {"test_accuracy": 0.1, "effective_density": effective, "density": 0.001, "diverged": diverged}
        return Job(method, 0.999, seed, None, tmp_path), summary

    rows = collect(
        [pair("set", 0, 0, False), pair("set", 1, 0, False), pair("rigl", 0, 0.001, True), pair("rigl", 1, 0, False)]
    )
    table, sheet = markdown(rows), list(csv.DictReader(as_csv(rows).splitlines()))
    assert "| set | 10.0 +- 0.0 (0%, dead) |" in table
    assert "| rigl | 10.0 +- 0.0 (50%, 1 of 2 dead, 1 of 2 diverged) |" in table
    assert "`+connected`" in table and "`--clip-norm`" in table
    assert [(row["dead"], row["diverged"]) for row in sheet] == [("2", "0"), ("1", "1")]
    assert "dead:" not in markdown(collect([pair("rigl", 0, 0.001, False)]))


def test_a_comparison_says_what_runs_and_shares_threads_as_the_environment_asks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("east_plugins.training.watch.SILENCE", 0.01)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert compare(tmp_path, "--methods", "set,rigl", "--sparsities", "0.8") == 0
    said = capsys.readouterr().err
    assert said.startswith("first     set-0.8-seed0\nnetwork   cnn with ") and "in all    2 runs, 1 at a time" in said
    assert "set-0.8-seed0 epoch 1/2" in said and "left in all" in said
    assert runs.read_config(tmp_path / "rigl-0.8-seed0").threads == 1


def test_a_stopped_comparison_leaves_table_and_picture_of_what_is_finished(tmp_path, monkeypatch):
    def stop(job, summary, number, count):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="stopped after 1 of 2 runs"):
        training_compare(["set", "rigl"], [0.8], tmp_path, finished=stop, model="cnn", width=4, epochs=1)
    assert "| set | " in (tmp_path / "table.md").read_text() and (tmp_path / "accuracy.png").exists()


def test_what_is_compared_with_east_is_trained_by_its_recipe_unless_one_is_asked_for(tmp_path):
    def recipes(methods, **settings):
        return [job.options.resolve(21).recipe for job in jobs(methods, [0.99], [0], tmp_path, settings)]

    assert recipes(["set", "rigl"]) == ["paper", "paper"]
    assert recipes(["rigl", "east", "rigl+connected"]) == ["east", "east", "east"]
    assert recipes(["rigl", "east"], recipe="es2") == ["es2", "es2"]
