"""Methods with a state of their own, in the trainer."""

import pytest

from east_plugins.__main__ import main
from east_plugins.training import runs

TINY = "--data digits --limit 160 --model cnn --width 4 --batch-size 32 --density 0.1 --threads 1 --device cpu --quiet"


def train(out, *flags):
    return main(["train", *TINY.split(), "--out", str(out), *flags])


@pytest.mark.parametrize(
    ("method", "stop", "flags"),
    [
        ("topkast", "13", ["--update-frequency", "3"]),
        ("suptickets", "57", []),
        pytest.param("force", "7", ["--sparse-init-rounds", "3"], marks=pytest.mark.slow),
        pytest.param(
            "rigl",
            "14",
            ["--growth", "averaged_gradient", "--growth-batches", "4", "--update-frequency", "8"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(method, stop, flags, tmp_path):
    flags = ["--method", method, "--epochs", "12", "--engine", "sparse", *flags]
    assert train(tmp_path / "whole", *flags) == 0
    assert train(tmp_path / "cut", *flags, "--limit-steps", stop) == 0
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert train(tmp_path / "cut", *flags, "--resume") == 0
    whole, cut = (runs.read_summary(tmp_path / name) for name in ("whole", "cut"))
    assert whole["weights_sha256"] == cut["weights_sha256"]
    assert whole["nonzeros"] == round(0.1 * whole["maskable"])


def test_topkast_counts_what_is_trained_until_its_end(tmp_path):
    assert train(tmp_path / "r", "--method", "topkast", "--epochs", "2") == 0
    lines, summary = runs.read_metrics(tmp_path / "r"), runs.read_summary(tmp_path / "r")
    final = round(0.1 * summary["maskable"])
    assert [line["nonzeros"] for line in lines] == [2 * final, final]
    assert summary["nonzeros"] == final and summary["best_epoch"] == 2


def test_data_that_info_has_not_is_one_line(tmp_path, capsys):
    assert main(["info", "--method", "snip", "--model", "cnn"]) == 2
    assert "--sparse-init snip looks at training data" in capsys.readouterr().err
    assert train(tmp_path / "r", "--method", "grasp+dctps") == 2
    assert "--sparse-init grasp: the sparse weights of DCTpS layers start at zero" in capsys.readouterr().err
