"""Options of plugins: frozen dataclasses that become flags, keys and help, wherever the plugin comes from."""

import logging
import re
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

from east_plugins import Config, Masking, growth
from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.options import flags, sources
from east_plugins.plugins.registry import Registry
from east_plugins.training import runs

PLUGINS = """
import math
from dataclasses import dataclass
from east_plugins import option

@dataclass(frozen=True)
class Leaky:
    "Largest gradients of small weights."

    tau: float = option(0.1, "how small", type=float)
    signed: bool = option(False, "positive gradients only")

    east_meta = {"needs": ("grad",)}

    def __call__(self, layer):
        grad = layer.grad if self.signed else layer.grad.abs()
        return grad / (layer.weight.abs() + self.tau)

@dataclass(frozen=True)
class Halving:
    "Half of the density so often."

    target: float
    frequency: int | None = None
    end: float = math.inf
    times: int = option(3, "how often", type=int)

    def density(self, step):
        left = max(0.0, 1 - step / (self.end / 2))
        return min(1.0, self.target * 2 ** round(self.times * left))

    def due(self, step):
        return 0 < step < self.end and self.frequency is not None and step % self.frequency == 0

def plain(layer):
    return layer.weight.abs()
"""
TINY = "--data digits --limit 96 --model cnn --width 4 --batch-size 32 --epochs 2 --device cpu --threads 1 --quiet"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def config(line):
    parser = flags.Parser(late=sources.late)
    sources.add_flags(parser)
    return sources.from_flags(vars(parser.parse_args(line.split())))


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("--method rigl --growth mine:Leaky --growth-tau 0.5", "growth_tau", 0.5),
        ("--method rigl --growth mine:Leaky --growth-signed", "growth_signed", True),
        ("--method rigl --growth mine:Leaky", "growth_tau", 0.1),
        ("--method rigl --death threshold --death-threshold 0.02", "death_threshold", 0.02),
        ("--method rigl --density-schedule mine:Halving --density-schedule-times 5", "density_schedule_times", 5),
        ("--method granet --density-schedule-initial 0.25", "density_schedule_initial", 0.25),
        ("--method rigl --decay-schedule-final 0.1", "decay_schedule_final", 0.1),
    ],
)
def test_options_are_flags_and_keys_and_come_back_from_the_runs_file(folder, line, option, value):
    found = config(line).resolve(10)
    assert found.plugin_options[option] == value
    runs.write_config(folder, found)
    assert runs.read_config(folder).resolve(10) == found
    assert yaml.safe_load((folder / "config.yaml").read_text())[option.replace("_", "-")] == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--method rigl --growth-tau 1", "--growth-tau"),
        ("--method rigl --growth mine:plain --growth-tau 1", "--growth-tau"),
        ("--method rigl --growth mine:Leaky --growth-tao 1", "--growth-tao 1; did you mean --growth-tau"),
        ("--method rigl --growth mine:Leaky --growth-tau x", "--growth-tau: invalid float"),
        ("--method rigl --death threshold --death-threshold -1", "--death-threshold must be at least 0"),
        ("--method granet --density-schedule-initial 2", r"--density-schedule-initial must be in \(0, 1\]"),
        ("--method granet --density-schedule-stop 0", "gradual pruning must run inside training"),
        ("--method rigl --density-schedule one-shoot", "did you mean one-shot"),
        ("--method rigl --density-schedule cyclic", "--east-cyclic"),
    ],
)
def test_a_wrong_option_is_one_line(folder, line, words, capsys):
    assert main(["info", "--model", "cnn", "--width", "4", "--density", "0.2", *line.split()]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1

    assert re.search(words, text), text


def test_help_lists_the_options_of_the_plugin_that_is_named(folder, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--growth", "mine:Leaky", "--help"])
    text = capsys.readouterr().out
    assert "--growth-tau X" in text and "how small (default: 0.1)" in " ".join(text.split())


def test_options_of_a_files_plugin_go_with_it(folder):
    (folder / "c.yaml").write_text("method: rigl\ngrowth: mine:Leaky\ngrowth-tau: 0.7\n")
    path = folder / "c.yaml"
    assert config(f"--config {path}").resolve(9).plugin_options["growth_tau"] == 0.7
    assert config(f"--config {path} --growth-tau 0.2").resolve(9).plugin_options["growth_tau"] == 0.2
    assert "growth_tau" not in config(f"--config {path} --growth random").resolve(9).plugin_options


def test_a_schedule_of_ones_own_trains_by_name(folder):
    out = folder / "run"
    flags = "--method rigl --density 0.05 --update-frequency 1 "
    flags += "--density-schedule mine:Halving --density-schedule-times 2"
    assert main(["train", *TINY.split(), *flags.split(), "--out", str(out)]) == 0
    lines = runs.read_metrics(out)
    assert lines[-1]["nonzeros"] == runs.read_summary(out)["nonzeros"]
    assert max(line["density"] for line in lines) >= lines[-1]["density"]


def test_a_rule_may_be_an_instance_in_code(folder):
    from mine import Leaky

    model = nn.Linear(10, 10)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode=Leaky(tau=2.0), update_frequency=1)
    host.add_module(model, density=0.1)
    model(torch.ones(1, 10)).sum().backward()
    host.step()
    assert (host.growth_mode, host.nonzeros, host.needs) == ("Leaky", 10, {"grad"})


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_the_threshold_of_the_prune_rule_arrives(threshold):
    model = nn.Linear(40, 40)
    host = Masking(
        torch.optim.SGD(model.parameters(), 0.0), death_rate=0.5, growth_mode="random", death_mode="threshold",
        options={"pruning": {"threshold": threshold}}, update_frequency=1,
    )  # fmt: skip
    host.add_module(model, density=0.1)
    model(torch.ones(1, 40)).sum().backward()
    host.step()
    assert bool(host.num_remove["weight"]) == (threshold > 0)


def test_an_entry_point_with_options(folder, monkeypatch):
    _install(folder, "luck = mine:Leaky")
    entry = Registry("growth").entry("luck")
    assert [field.name for field in entry.options] == ["tau", "signed"]
    assert entry.bound({"tau": 3.0}).tau == 3.0
    with pytest.raises(UsageError, match="no option 'no'; its options: tau, signed"):
        entry.bound({"no": 1})


def test_a_broken_package_is_one_warning(folder, caplog):
    _install(folder, "broken = a_module_that_is_missing:rule\nfine = mine:plain")
    registry = Registry("growth")
    with caplog.at_level(logging.WARNING):
        assert registry.names() == ["fine"]
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    assert "a_module_that_is_missing" in caplog.text
    with pytest.raises(UsageError, match="broken.*cannot be loaded"):
        registry.entry("broken")


def test_a_broken_package_leaves_every_command_working(folder):
    _install(folder, "broken = a_module_that_is_missing:rule")
    command = [sys.executable, "-m", "east_plugins", "info", "--model", "cnn", "--width", "4", "--density", "0.2"]
    result = subprocess.run([*command, "--growth", "random"], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0 and "active weights" in result.stdout
    said = [line for line in result.stderr.splitlines() if not line.startswith("east_plugins info: ")]  # it is at work
    assert len(said) == 1 and "a_module_that_is_missing" in said[0]


def test_a_need_that_no_host_meets_is_refused():
    with pytest.raises(UsageError, match="needs 'gradient'; allowed are grad, momentum"):
        growth.register("wishful", needs=("gradient",))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(prune_scope="globl"), dict(optimizer="adamx"), dict(dctps_engine="xx"), dict(density_schedule="one-shoot"),
        dict(engine="fast"), dict(weight_init="x"), dict(density=2), dict(death_rate=-1), dict(method="rigl+connectd"),
        dict(method="rigl+dyrelu+dyrelu"), dict(method="static", update_frequency=3),
    ],
    ids=str,
)  # fmt: skip
def test_choices_hold_whoever_makes_the_configuration(wrong):
    with pytest.raises(UsageError):
        Config(**{"method": "rigl", **wrong})


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("--method rigl", "rigl"),
        ("--method east", "east"),
        ("--method east --dctps", "east+dctps"),
        ("--method rigl --east-dyrelu", "rigl+dyrelu"),
        ("--method rigl --growth random", "rigl[growth=random]"),
        ("--method dense --density 0.01", "dense[density=0.01]"),
        ("--method rigl+connected --sparse-init ERK", "rigl+connected[sparse_init=ERK]"),
        ("--method granet --initial-density 0.5", "granet"),
        ("--method gmp --initial-density 0.5", "gmp[density_schedule_initial=0.5]"),
        ("--method rigl --death-rate 0.3", "rigl"),
    ],
)
def test_a_run_is_labelled_as_what_it_is(line, label):
    assert config(line).resolve(100).label == label


def test_a_configuration_from_python_stands_for_its_method():
    resolved = Config(method="east", epochs=10).resolve(100)
    assert (resolved.growth, resolved.east.cyclic, resolved.east.dyrelu, resolved.east.share) == (
        "gradient",
        *[True] * 3,
    )
    assert resolved.label == "east"


def _install(folder, points):
    info = folder / "somebodys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[east_plugins.growth]\n{points}\n")
