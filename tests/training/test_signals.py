"""Gradient flow and positive inputs of the ReLUs over a run."""

import math

import pytest

from east_plugins.__main__ import main
from east_plugins.ops.signals import gradient_norms, positive_preactivations
from east_plugins.training import runs
from east_plugins.training.images import sample
from east_plugins.training.signals import IMAGES, MOST, Signals

FLAGS = (
    "--method rigl+dyrelu --model resnet20 --width 4 --data digits --limit 160 --batch-size 40 --density 0.1".split()
)
FLAGS += "--epochs 4 --threads 1 --update-frequency 3 --lr-drops 3 --device cpu --quiet".split()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run that is measured after every epoch, and the same one that is not."""
    out = tmp_path_factory.mktemp("signals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Signals, "due", lambda self, seconds: True)
        assert main(["train", *FLAGS, "--engine", "sparse", "--signals", "--out", str(out / "with")]) == 0
    assert main(["train", *FLAGS, "--engine", "sparse", "--out", str(out / "without")]) == 0
    return out / "with", out / "without"


def test_measuring_leaves_no_trace_in_the_run(pair):
    digests = [runs.read_summary(path)["weights_sha256"] for path in pair]
    assert digests[0] == digests[1]
    assert "gradient_flow" not in runs.read_metrics(pair[1])[0]


def test_every_relu_is_counted_in_before_and_after_the_phase(pair):
    lines = runs.read_metrics(pair[0])
    assert [len(line["positive"]) for line in lines] == [19] * 4
    assert lines[0]["beta"] > 0 == lines[-1]["beta"]
    for line in lines:
        assert line["positive_preactivations"] == pytest.approx(sum(line["positive"]) / 19, abs=1e-5)
        assert math.isfinite(line["gradient_flow"]) and line["gradient_flow"] > 0


def test_the_last_ones_are_those_of_the_networks_weights(pair):
    last = runs.read_metrics(pair[0])[-1]
    run = runs.load_run(pair[0], last=True)
    x, y = next(iter(sample(runs.load_data(run.config).validation, IMAGES).batches(IMAGES)))
    assert last["positive"] == pytest.approx(positive_preactivations(run.model, x), abs=1e-4)
    assert last["gradient_flow"] == pytest.approx(sum(gradient_norms(run.model, run.masks, x, y).values()), rel=1e-3)


def test_measuring_takes_its_share_of_the_time_and_no_more():
    signals = Signals(data=None)
    assert signals.due(0.0)
    signals.spent = 1.0
    assert not signals.due(0.99 / MOST) and signals.due(1.0 / MOST)
