"""Pictures of runs: what is drawn, and where it comes from."""

import json

import pytest
from matplotlib import figure as matplotlib_figure

from east_plugins.__main__ import main
from east_plugins.ops import figures

PANELS = ["test accuracy (%)", "positive inputs by ReLU, at the end (%)", "positive inputs of the ReLUs (%)",
          "gradient flow: sum of the layers' norms", "ITOP rate (%)", "active weights on a path (%)",
          "layers that nothing passes through"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("plots") / "c"
    flags = (
        "--model cnn --width 4 --data digits --limit 120 --batch-size 60 --epochs 3 --threads 1 --device cpu --signals"
    )
    flags += " --methods set,rigl+dyrelu --sparsities 0.7,0.9 --seeds 0,1 --lr-drops 2.5"
    assert main(["compare", *flags.split(), "--out", str(out)]) == 0
    return out


def drawn(monkeypatch, words):
    """The figure that a command draws."""
    kept, save = [], figures.save

    def keep(picture, path, what):
        kept.append(picture)
        save(picture, path, what)

    monkeypatch.setattr(figures, "save", keep)
    assert main(words) == 0
    (found,) = kept
    assert isinstance(found, matplotlib_figure.Figure)
    return {axes.get_title(): axes for axes in found.axes if axes.get_title()}


def test_a_comparison_is_drawn_with_all_panels_and_medians_over_seeds(compared, tmp_path, monkeypatch, capsys):
    axes = drawn(monkeypatch, ["analyze", str(compared), "--plot", str(tmp_path / "a.png"), "--json"])
    assert list(axes) == PANELS and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads(capsys.readouterr().out)
    of_rigl = [run for run in report["runs"] if run["method"] == "rigl+dyrelu"]
    lines = {line.get_label(): line for line in axes["test accuracy (%)"].get_lines()}
    assert set(lines) == {"set", "rigl+dyrelu"}
    tested = [run["test_accuracy"] for run in of_rigl if abs(run["density"] - 0.3) < 0.01]
    assert lines["rigl+dyrelu"].get_ydata()[0] == pytest.approx(100 * sum(tested) / 2)
    assert [text.get_text() for text in axes["test accuracy (%)"].get_xticklabels()] == ["70", "90"]
    over_time = axes["ITOP rate (%)"].get_lines()
    assert len(over_time) == 4 and all(list(line.get_xdata()) == [1, 2, 3] for line in over_time)
    kinds = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in over_time}
    assert kinds["set 70 %"][0] == kinds["set 90 %"][0] == lines["set"].get_color() != lines["rigl+dyrelu"].get_color()
    assert kinds["set 70 %"][1] == kinds["rigl+dyrelu 70 %"][1] != kinds["set 90 %"][1]
    assert len(set(kinds.values())) == 4
    assert all(tick == int(tick) for tick in axes["ITOP rate (%)"].get_xticks())
    legend = [text.get_text() for text in axes["ITOP rate (%)"].figure.legends[0].get_texts()]
    assert legend[-1] == "from the lowest to the highest seed"
    spans = [patch for patch in axes["gradient flow: sum of the layers' norms"].patches if patch.get_label()]
    assert spans[0].get_label() == "DyReLU is phased out"


def test_what_no_run_has_is_no_panel(tmp_path, monkeypatch, capsys):
    flags = "--method set --model cnn --width 4 --data digits --limit 120 --density 0.3 --epochs 1 --threads 1 --quiet"
    assert main(["train", *flags.split(), "--out", str(tmp_path / "a")]) == 0
    axes = drawn(monkeypatch, ["analyze", str(tmp_path / "a"), "--plot", str(tmp_path / "a.svg")])
    assert list(axes) == [PANELS[1], *PANELS[4:]]
    assert main(["analyze", str(tmp_path / "a"), "--plot", str(tmp_path / "a.txt")]) == 2
    assert "--plot" in capsys.readouterr().err and not (tmp_path / "a.txt").exists()


def test_runs_that_hold_nothing_yet_are_one_line(tmp_path, capsys):
    flags = "--method set --model cnn --width 4 --data digits --limit 120 --density 0.3 --threads 1 --quiet"
    assert main(["train", *flags.split(), "--limit-steps", "1", "--out", str(tmp_path / "a")]) == 0
    (tmp_path / "a" / "checkpoint.pt").unlink()
    assert main(["analyze", str(tmp_path / "a"), "--plot", str(tmp_path / "a.png")]) == 2
    assert "the runs hold nothing that could be drawn yet" in capsys.readouterr().err
