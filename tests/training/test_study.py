"""Command study: which runs a grid has, what is written, and what the similarities are of."""

import csv
import json
import statistics
from pathlib import Path

import pytest
import torch

from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.measure import ranks, study_report
from east_plugins.measure import study as measured
from east_plugins.measure.similarity import mean_jaccard
from east_plugins.ops import checkpoints
from east_plugins.options.programs import Program
from east_plugins.training import cycles, runs, study
from east_plugins.training.trainer import Trainer

TINY = dict(data="digits", limit=160, image_size=8, model="mlp", batch_size=32, epochs=2, device="cpu", engine="dense")
FLAGS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_every_criterion_has_every_growth_density_period_and_seed_and_baselines_theirs(tmp_path):
    cells = study.cells(
        ["magnitude", "SNIP", "static", "dense"], ["random", "gradient"], [0.05, 0.2], [3, 6], [0, 1], tmp_path, TINY
    )
    assert len(cells) == 2 * 2 * 2 * 2 * 2 + 2 * 2 + 2 and len({cell.job.out for cell in cells}) == len(cells)
    some = next(c for c in cells if (c.criterion, c.growth, c.density, c.period) == ("SNIP", "gradient", 0.2, 6))
    assert (some.job.options.death, some.job.options.growth, some.job.options.update_frequency) == (
        "SNIP", "gradient", 6,
    )  # fmt: skip
    assert some.job.options.density == 0.2 and cells[-1].job.options.decided("density") == 1.0
    connected = study.cells(["magnitude", "static"], ["random"], [0.2], [3], [0], tmp_path,
                            {**TINY, "method": "rigl+connected"})  # fmt: skip
    assert [cell.job.method for cell in connected] == ["rigl+connected", "static+connected"]


def test_an_option_goes_to_the_criteria_that_have_it(tmp_path, capsys):
    cells = study.cells(["magnitude", "MEST"], ["random"], [0.2], [3], [0], tmp_path, {**TINY, "death_lam": 0.5})
    assert [cell.job.options.plugin_options for cell in cells] == [{}, {"death_lam": 0.5}]
    words = [*FLAGS, *"--criteria magnitude,MEST --death-lam -1 --densities 0.2 --seeds 0 --periods 3".split()]
    assert main(["study", *words, "--out", str(tmp_path / "x")]) == 2
    assert "--death-lam must be at least 0" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("change, message", [
    ({"criteria": ["magnitud"]}, "did you mean magnitude"),
    ({"densities": [0.2, 0.2]}, "`densities` must differ"),
    ({"seeds": []}, "`seeds` must name at least one"),
    ({"settings": {"death": "SNIP"}}, "`death` cannot be given to study"),
    ({"settings": {"death_lam": 0.5}}, "`death_lam` is no option of any of the criteria magnitude"),
])  # fmt: skip
def test_grids_that_cannot_be_are_refused(change, message, tmp_path):
    grid = {"criteria": ["magnitude"], "growths": ["random"], "densities": [0.2], "periods": [3], "seeds": [0]}
    grid |= {name: value for name, value in change.items() if name != "settings"}
    with pytest.raises(UsageError, match=message):
        study.cells(**grid, out=tmp_path, settings={**TINY, **change.get("settings", {})})


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
ALL = dict.fromkeys(("criteria", "growths", "densities", "periods", "seeds"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_file_is_a_study_or_a_program_that_resolves(path, tmp_path):
    settings = {"config": str(path), **({"data": "digits"} if path.stem == "where_to_prune" else {})}
    if path.stem.startswith("cycles"):
        todo = [
            stage.options for stage in cycles.stages(Program(program="lrr"), tmp_path, {**settings, "density": 0.3})
        ]
    else:
        lists = study.lists(ALL, settings)
        todo = [cell.job.options for cell in study.cells(**lists, out=tmp_path, settings=settings)]
        assert len(todo) > 20 and {"magnitude", "static", "dense"} <= set(lists["criteria"])
    resolved = [options.resolve(300) for options in todo]
    assert len({str(options.as_dict()) for options in resolved}) == len(todo)
    first = resolved[0]
    shape = {"openml:44129": (24, 1, 1), "fashionmnist": (1, 28, 28), "digits": (1, 16, 16),
             "tinyimagenet": (3, 64, 64), "imagenet": (3, 224, 224)}.get(first.data, (3, 32, 32))  # fmt: skip
    with torch.device("meta"):
        assert runs.build_model(first, 2 if shape[1] == 1 else 10, shape)


def test_numbers_of_the_setups_are_those_of_appendix_a2():
    def resolved(name, criterion="SNIP"):
        settings = {"config": str(CONFIGS[0].parent / f"{name}.yaml")}
        grid = study.lists({**ALL, "criteria": [criterion]}, settings)
        cells = study.cells(**grid, out=Path("out"), settings=settings)
        return len(cells), cells[0].job.options.resolve(300)

    count, cnn = resolved("small_cnn_cifar10")
    assert count == 2 * 11 * 5 and (cnn.epochs, cnn.batch_size, cnn.lr, cnn.weight_decay) == (100, 128, 0.01, 5e-4)
    assert cnn.nesterov and cnn.lr_drops == [50, 75] and (cnn.sparse_init, cnn.update_frequency) == ("ERK", 800)
    count, imagenet = resolved("resnet50_imagenet")
    assert count == 3 and (imagenet.epochs, imagenet.batch_size, imagenet.density) == (90, 256, 0.2)
    assert resolved("large_mlp_cifar10")[1].sparse_init == "ER"
    assert resolved("small_mlp_higgs", "static")[1].sparse_init == "ER"
    vgg = resolved("vgg16_cifar100")[1]
    assert (vgg.epochs, vgg.lr, vgg.weight_decay) == (200, 0.01, 1e-4)


@pytest.mark.parametrize("text, message", [
    ("grid:\n  width: [4, 8]\n", "has death, growth, density, update-frequency and seed, not width"),
    ("grid:\n  - seed: [1]\n  - seed: [2]\n", "has one block, this one has 2"),
])  # fmt: skip
def test_grids_of_something_else_are_refused(text, message, tmp_path):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        study.lists(ALL, {"config": str(tmp_path / "s.yaml")})


def records_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_period_that_the_run_does_not_reach_is_refused_before_any_run(tmp_path, capsys):
    words = [*FLAGS, *"--criteria magnitude,static --growths random --densities 0.2 --seeds 0".split()]
    assert main(["study", *words, "--periods", "3,500", "--out", str(tmp_path / "x")]) == 2
    assert "`periods` 500: a run of 10 steps has no topology update" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_study_writes_tables_and_pictures_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    flags = "--criteria magnitude,SNIP,RunningMagnitude,static --growths gradient --densities 0.1,0.3 --periods 2,4"
    words = ["study", *FLAGS, *flags.split(), *"--seeds 0 --low 0.1 --out".split(), str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    records = records_of(tmp_path / "study.csv")
    assert len(records) == 3 * 2 * 2 + 2
    summary = json.loads((tmp_path / records[0]["run"] / "summary.json").read_text())
    assert float(records[0]["test_accuracy"]) == summary["test_accuracy"]
    assert float(records[0]["itop_rate"]) == summary["itop_rate"] > 0.1

    ranked = records_of(tmp_path / "ranks.csv")
    assert {row["settings"] for row in ranked} == {"all densities", "densities up to 0.1", "densities over 0.1"}
    scores = {}
    for row in records:
        if row["criterion"] != "static":
            key = row["density"], row["period"]
            scores.setdefault(key, {}).setdefault(row["criterion"], []).append(float(row["test_accuracy"]))
    direct = ranks.ranks([{name: statistics.fmean(v) for name, v in each.items()} for each in scores.values()])
    for row in ranked:
        if row["settings"] == "all densities":
            assert float(row["average_rank"]) == pytest.approx(direct.average[row["criterion"]])
            assert float(row["critical_distance"]) == pytest.approx(direct.distance)
    for name in ("accuracy-every2", "accuracy-every4", "period", "itop", "common", "masks-gradient-0.1"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"{name}.png" in said
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == said.count(".png") and "study.csv" in page
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    lists = dict(criteria=["magnitude", "SNIP", "RunningMagnitude", "static"], growths=["gradient"], seeds=[0])
    again = study.run(**lists, densities=[0.1, 0.3], periods=[2, 4], out=tmp_path, **TINY)
    assert measured.rows(again)[3]["test_accuracy"] == float(records[3]["test_accuracy"])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_similarities_are_those_of_the_masks_and_choices(tmp_path):
    done = study.run(["magnitude", "SET", "SNIP"], ["gradient"], [0.2], [3], [0, 1], tmp_path, **TINY)
    cells = [cell for cell, _ in done]
    pairs = measured.end_similarity(cells)
    masks = {(c.criterion, c.seed): checkpoints.end_of(c.job.out)[1] for c in cells}
    assert pairs["magnitude", "SNIP"] == [
        mean_jaccard(masks["magnitude", seed], masks["SNIP", seed]) for seed in (0, 1)
    ]
    assert pairs["SET", "SET"] == [1.0, 1.0] and len(pairs["SET", measured.EXPECTED]) == 2
    start = Trainer(cells[0].job.options, tmp_path / "x").host.masks
    assert pairs["magnitude", measured.START][0] == mean_jaccard(masks["magnitude", 0], start) < 1

    choices = measured.choice_similarity(cells)
    trainer = Trainer(cells[0].job.options, tmp_path / "x")
    next(trainer.updates())
    assert trainer.host.steps == 2
    rate = trainer.host.death_rate
    direct = [trainer.host.removed_by(name, rate) for name in ("magnitude", "SNIP")]
    assert choices["magnitude", "SNIP"][0] == mean_jaccard(*direct) < choices["magnitude", "SET"][0] <= 1
    (first, _), each = measured.common(cells), [masks[name, 0] for name in ("magnitude", "SET", "SNIP")]
    kept = sum(int((each[0][n] & each[1][n] & each[2][n]).sum()) for n in each[0])
    assert first["kept_by_all"] == pytest.approx(kept / sum(int(mask.sum()) for mask in each[0].values()))


def test_the_critical_distance_diagram_is_drawn_where_scikit_posthocs_is_there(tmp_path, monkeypatch):
    found = ranks.ranks([{"a": 3.0, "b": 2.0, "c": 1.0}] * 5)
    monkeypatch.setitem(__import__("sys").modules, "scikit_posthocs", None)
    assert not study_report.diagram(found, tmp_path / "cd.png", "none")
    monkeypatch.undo()
    pytest.importorskip("scikit_posthocs")
    assert study_report.diagram(found, tmp_path / "cd.png", "five settings")
    assert (tmp_path / "cd.png").read_bytes()[:4] == b"\x89PNG"


def test_choices_over_time_are_those_in_the_states_of_each_criterions_own_run(tmp_path, capsys):
    flags = "--criteria magnitude,SNIP,RunningSNIP --growths gradient --densities 0.2 --periods 2 --seeds 0".split()
    assert main(["study", *FLAGS, *flags, "--choices-every", "2", "--out", str(tmp_path)]) == 0
    assert "choices-gradient-0.2-every2.png" in capsys.readouterr().out
    found = records_of(tmp_path / "choices.csv")
    cells = study.cells(["magnitude", "SNIP"], ["gradient"], [0.2], [2], [0], tmp_path, TINY)
    trainer = Trainer(cells[1].job.options, tmp_path / "x")
    steps = []
    for step in trainer.updates():
        steps.append(step)
        masks = [trainer.host.removed_by(name, trainer.host.death_rate) for name in ("SNIP", "magnitude")]
        mine = [row for row in found if (row["criterion"], int(row["step"])) == ("SNIP", step)]
        if len(steps) % 2:
            assert [(row["other"], float(row["jaccard"])) for row in mine] == [("magnitude", mean_jaccard(*masks))]
            assert 0 < float(mine[0]["expected"]) < 1
        else:
            assert not mine
    assert len(steps) > 2 and {row["criterion"] for row in found} == {"magnitude", "SNIP"}
    assert main(["study", *FLAGS, *flags, "--choices-every", "0", "--out", str(tmp_path / "y")]) == 2
    assert "--choices-every must be at least 1, got 0" in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_a_run_taken_from_update_to_update_is_the_run_itself(tmp_path):
    (cell,) = study.cells(["SNIP"], ["gradient"], [0.2], [3], [0], tmp_path, {**TINY, "tested": "last"})
    study.run(["SNIP"], ["gradient"], [0.2], [3], [0], tmp_path, **TINY, tested="last")
    end, masks = checkpoints.end_of(cell.job.out)
    trainer = Trainer(cell.job.options, tmp_path)
    assert len(list(trainer.updates())) == 3
    assert all(torch.equal(trainer.host.masks[name], mask) for name, mask in masks.items())
    assert all(torch.equal(value, end[name]) for name, value in trainer.model.state_dict().items())


def test_a_network_brought_to_its_first_update_is_what_the_update_sees(tmp_path):
    (cell,) = study.cells(["magnitude"], ["random"], [0.2], [3], [0], tmp_path, TINY)
    trainer, other = (Trainer(cell.job.options, tmp_path) for _ in range(2))
    next(trainer.updates())
    batches = other.data.train.batches(32, other.generator)
    other.model.train()
    for _ in range(2):
        other._step(*next(batches))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True))
    expected = other.host.removed_by("magnitude", trainer.host.death_rate)
    found = trainer.host.removed_by("magnitude", trainer.host.death_rate)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(UsageError, match="has no topology update"):
        (still,) = study.cells(["static"], ["random"], [0.2], [3], [0], tmp_path, TINY)
        next(Trainer(still.job.options, tmp_path).updates())
