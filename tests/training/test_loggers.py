"""Loggers by name, and a function of one's own."""

import csv
import json
import logging
import sys

import pytest

from east_plugins import Config, train
from east_plugins.__main__ import main
from east_plugins.errors import EastError
from east_plugins.training import loggers, runs

FLAGS = "--method set --model cnn --width 4 --data digits --limit 120 --batch-size 60 --density 0.3 --threads 1".split()
TINY = dict(method="set", model="cnn", width=4, data="digits", limit=120, batch_size=60, density=0.3, threads=1)


def metrics(out):
    return [json.loads(line) for line in (out / runs.METRICS).read_text().splitlines()]


def run(out, *more):
    return main(["train", *FLAGS, "--epochs", "3", "--quiet", *more, "--out", str(out)])


def test_csv_has_a_line_an_epoch_and_is_cut_where_a_run_goes_on(tmp_path):
    assert run(tmp_path / "a", "--loggers", "csv") == 0
    whole = (tmp_path / "a" / "metrics.csv").read_text()
    with open(tmp_path / "a" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    lines = metrics(tmp_path / "a")
    assert [(int(r["epoch"]), float(r["validation_accuracy"])) for r in rows] == [
        (line["epoch"], line["validation_accuracy"]) for line in lines
    ]
    assert not list((tmp_path / "a").glob("events.*")) and "layers" not in rows[0]
    options = Config(**TINY, epochs=3, loggers=["csv"]).resolve(2)
    again = loggers.Loggers(options, tmp_path / "a", done=1)
    again.epoch(lines[1])
    assert (tmp_path / "a" / "metrics.csv").read_text().splitlines() == whole.splitlines()[:3]


def test_tensorboard_is_the_default_and_none_is_none(tmp_path):
    assert run(tmp_path / "a") == 0 and list((tmp_path / "a").glob("events.*"))
    assert run(tmp_path / "b", "--loggers", "none") == 0 and not list((tmp_path / "b").glob("events.*"))


def test_a_function_gets_every_epochs_line(tmp_path):
    seen = []
    train(Config(**TINY, epochs=2, loggers=[]), tmp_path / "a", quiet=True, on_epoch=seen.append)
    assert seen == metrics(tmp_path / "a") and len(seen) == 2


def test_loggers_are_no_part_of_what_a_run_is(tmp_path):
    assert run(tmp_path / "a", "--limit-steps", "2") == 0
    assert run(tmp_path / "a", "--resume", "--loggers", "csv") == 0


@pytest.mark.parametrize(
    "name, words", [("wandb", "--loggers wandb: pip install wandb"), ("mlflow", "--loggers mlflow: pip install mlflow")]
)
def test_a_logger_that_is_not_installed_is_one_line_and_nothing_is_written(name, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    assert run(tmp_path / "a", "--loggers", f"csv,{name}") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_an_unknown_logger_is_answered_with_the_nearest(tmp_path, capsys):
    assert run(tmp_path / "a", "--loggers", "wandbb") == 2
    assert "unknown --loggers 'wandbb'; did you mean wandb" in capsys.readouterr().err


def test_a_logger_that_fails_on_the_way_stops_no_run(tmp_path, monkeypatch, caplog):
    def away(self, values, epoch):
        raise ConnectionError("the server is away")

    monkeypatch.setattr(loggers.TensorBoard, "epoch", away)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "a", "--loggers", "tensorboard,csv") == 0
    assert caplog.text.count("logger tensorboard is left out from here on: the server is away") == 1
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) == 4


def test_a_logger_that_cannot_begin_says_why(tmp_path, monkeypatch):
    pytest.importorskip("wandb")

    def refused(**_):
        raise RuntimeError("api key not\nfound")

    monkeypatch.setattr("wandb.init", refused)
    with pytest.raises(EastError, match="`loggers` wandb: api key not found"):
        train(Config(**TINY, epochs=1, loggers=["csv", "wandb"]), tmp_path / "a", quiet=True)


@pytest.mark.slow
def test_weights_and_biases_gets_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path / "a", "--loggers", "wandb") == 0
    (folder,) = (tmp_path / "a" / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))


@pytest.mark.slow
def test_mlflow_gets_a_run_and_goes_on_with_it(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    assert run(tmp_path / "a", "--loggers", "mlflow") == 0
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("east_plugins")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "validation_accuracy")
    assert [(m.step, m.value) for m in history] == [
        (x["epoch"], x["validation_accuracy"]) for x in metrics(tmp_path / "a")
    ]
    summary = runs.read_summary(tmp_path / "a")
    assert found.data.metrics["final_test_accuracy"] == summary["test_accuracy"]
    assert found.data.params["method"] == "set" and found.info.status == "FINISHED"
    again = loggers.MLflow(Config(**TINY, epochs=3).resolve(2), tmp_path / "a", done=3)
    assert again.id == found.info.run_id
