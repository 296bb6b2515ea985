"""Cyclic training, SCULPT-ing and prune-train loops: what each stage begins with, and with how many weights."""

import csv
import json

import pytest
import torch
from torch.nn import functional as F

from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.ops import checkpoints
from east_plugins.options import sources
from east_plugins.options.programs import Program
from east_plugins.training import cycles, runs, update_batch
from east_plugins.training.trainer import Trainer, train

TINY = dict(
    data="digits", limit=160, model="cnn", width=8, batch_size=32, epochs=2, device="cpu", threads=1, engine="dense"
)


@pytest.mark.parametrize("program, settings, densities", [
    ("cyclic", {"cycles": 4}, [0.1] * 4),
    ("sculpt", {"cycles": 2}, [0.5, 0.5, 0.1]),
    ("sculpt", {"cycles": 1, "first_density": 0.3}, [0.3, 0.1]),
    ("lrr", {"prune": 0.5}, [1, 0.5, 0.25, 0.125, 0.1]),
    ("imp", {"first_density": 0.1}, [0.1]),
    ("wr", {"prune": 0.9}, [1, 0.1]),
])  # fmt: skip
def test_the_densities_of_a_program_end_at_the_one_asked_for(program, settings, densities):
    assert Program(program=program, **settings).densities(0.1) == pytest.approx(densities)


def begun(stage):
    """Weights, all of them, and masks that a stage's training begins with."""
    trainer = Trainer(stage.options, stage.out)
    return {n: v.clone() for n, v in trainer.model.state_dict().items()}, dict(trainer.host.masks)


def same(weights, others, masks):
    """Whether all entries are the same bits, masked ones up to their masks."""
    assert weights.keys() == others.keys()
    return all(torch.equal(w, others[n] * masks[n] if n in masks else others[n]) for n, w in weights.items())


@pytest.mark.parametrize("program, rewound_to", [("imp", 0), ("wr", 1), ("lrr", None)])
def test_prune_train_loops_rewind_what_they_name_and_prune_by_magnitude(program, rewound_to, tmp_path):
    asked = Program(program=program, prune=0.6, **({"rewind": 1} if program == "wr" else {}))
    done = cycles.run(asked, tmp_path, method="static", density=0.1, **TINY)
    assert [stage.options.density for stage, _ in done] == pytest.approx([1, 0.4, 0.16, 0.1])
    if program == "imp":  # the kept file is what training began with
        first, masks = begun(done[0][0])
        assert same(first, checkpoints.weights(tmp_path / "stage1" / "weights-0.pt"), masks)
    for (before, _), (stage, summary) in zip(done, done[1:], strict=False):
        end, kept = checkpoints.end_of(before.out)
        weights, masks = begun(stage)
        named = end if rewound_to is None else checkpoints.weights(tmp_path / "stage1" / f"weights-{rewound_to}.pt")
        assert same(weights, named, masks)
        sizes = torch.cat([end[name][mask].abs() for name, mask in kept.items()])
        chosen = torch.cat([end[name][mask].abs() for name, mask in masks.items()])
        assert all(not (mask & ~kept[name]).any() for name, mask in masks.items())
        assert torch.equal(chosen.sort().values, sizes.sort().values[-len(chosen) :])
        assert summary["nonzeros"] == len(chosen) == round(stage.options.density * summary["maskable"])


def test_sculpting_is_cycles_of_one_mask_one_pruning_and_one_more_cycle(tmp_path):
    asked = Program(program="sculpt", cycles=2, first_density=0.2)
    done = cycles.run(asked, tmp_path, method="static+connected", density=0.05, **TINY)
    masks = [checkpoints.end_of(stage.out)[1] for stage, _ in done]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert all(not (masks[2][name] & ~masks[1][name]).any() for name in masks[2])
    assert [summary["nonzeros"] for _, summary in done] == [round(d * done[0][1]["maskable"]) for d in (0.2, 0.2, 0.05)]
    for (before, _), (stage, _) in zip(done, done[1:], strict=False):
        weights, kept = begun(stage)
        assert same(weights, checkpoints.end_of(before.out)[0], kept)
        trainer = Trainer(stage.options, stage.out)
        assert not trainer.optimizer.state and trainer.scheduler.get_last_lr() == [0.1]
    orders = [Trainer(stage.options, stage.out).generator.initial_seed() for stage, _ in done]
    assert len(set(orders)) == 3


def test_cycles_compose_with_a_dynamic_mask_a_connected_start_and_phased_activations(tmp_path):
    done = cycles.run(
        Program(cycles=2), tmp_path, method="rigl+connected+dyrelu", density=0.2, update_frequency=2,
        **{**TINY, "epochs": 3},
    )  # fmt: skip
    end, masks = checkpoints.end_of(done[0][0].out)
    assert not any("fc" in name and "act" in name for name in end)
    trainer = Trainer(done[1][0].options, tmp_path)
    assert all(torch.equal(trainer.host.masks[name], masks[name]) for name in masks)
    last = checkpoints.end_of(done[1][0].out)[1]
    assert sum(int(mask.sum()) for mask in last.values()) == sum(int(mask.sum()) for mask in masks.values())
    assert any(not torch.equal(last[name], masks[name]) for name in masks)


FLAGS = "--data digits --limit 160 --model cnn --width 8 --batch-size 32 --epochs 2 --device cpu --threads 1".split()


def test_the_command_writes_table_and_picture_and_goes_on_where_it_was_stopped(tmp_path, capsys):
    words = ["cycles", *FLAGS, *"--quiet --images 64 --program sculpt --cycles 1 --density 0.1 --out".split()]
    assert main([*words, str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and len(table.splitlines()) == 4
    with open(tmp_path / "cycles.csv") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads((tmp_path / "stage2" / "summary.json").read_text())
    assert int(rows[1]["nonzeros"]) == summary["nonzeros"] and 0 <= int(rows[1]["flipped"]) <= int(rows[1]["common"])
    with open(tmp_path / "line.csv") as file:
        assert len(list(csv.DictReader(file))) == 2 * 11
    assert (tmp_path / "cycles.png").read_bytes()[:4] == b"\x89PNG"
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/summary.json"))]
    assert main([*words, str(tmp_path)]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/summary.json"))] == stamps


@pytest.mark.parametrize("words, message", [
    ("--program lrr --cycles 2", "--cycles is of --program cyclic, sculpt, not of lrr"),
    ("--program sculpt --first-density 0.001 --density 0.1", "--first-density 0.001 is smaller than --density 0.1"),
    ("--program wr --rewind 3", "--rewind must be an epoch from 1 to 2, got 3"),
    ("--start runs/a", "--start cannot be given here"),
    ("--limit-steps 3", "--limit-steps cannot be given here"),
    ("--cycles 0", "--cycles must be from 1 to 1000, got 0"),
])  # fmt: skip
def test_programs_that_cannot_be_are_one_line_and_nothing_is_written(words, message, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["cycles", *FLAGS, *words.split(), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def config(**settings):
    return sources.from_flags({**TINY, "method": "static", "density": 0.5, **settings})


def test_the_rate_rises_over_the_warmup_and_then_drops(tmp_path):
    trainer = Trainer(config(warmup=1.0, epochs=4, lr=0.2, lr_drops=[2, 3]), tmp_path)
    steps, rates = trainer.options.steps_per_epoch, []
    for _ in range(4 * steps):
        rates.append(trainer.scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates[0] == pytest.approx(0.02) and rates[steps] == pytest.approx(0.2)
    assert rates[:steps] == pytest.approx([0.02 + 0.18 * i / steps for i in range(steps)])
    assert rates[2 * steps] == pytest.approx(0.02) and rates[-1] == pytest.approx(0.002)


def test_a_run_begins_from_a_file_of_weights_and_a_head_of_other_classes_anew(tmp_path):
    trainer = Trainer(config(), tmp_path)
    state = {f"module.{name}": torch.randn_like(v) if v.is_floating_point() else v
             for name, v in trainer.model.state_dict().items()}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "dense.pt")
    begun = Trainer(config(start=str(tmp_path / "dense.pt"), density=0.3, sparse_init="magnitude"), tmp_path)
    largest = {n: w.abs() >= w[begun.host.masks[n]].abs().min() for n, w in begun.host.weights.items()}
    for name, weight in begun.host.weights.items():
        assert torch.equal(weight, state[f"module.{name}"] * begun.host.masks[name]), largest
    every = torch.cat([state[f"module.{name}"].abs().flatten() for name in begun.host.masks])
    kept = torch.cat([w[begun.host.masks[n]].abs() for n, w in begun.host.weights.items()])
    assert torch.equal(kept.sort().values, every.sort().values[-len(kept) :])

    state["module.fc.weight"], state["module.fc.bias"] = torch.randn(7, 32), torch.randn(7)
    torch.save(state, tmp_path / "seven.pt")
    begun = Trainer(config(start=str(tmp_path / "seven.pt"), density=1.0), tmp_path)
    assert torch.equal(begun.model.fc.weight, trainer.model.fc.weight) or begun.model.fc.weight.shape == (10, 32)
    assert torch.equal(begun.model.features[0].weight, state["module.features.0.weight"])
    del state["module.features.1.bias"]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UsageError, match="`start` .*other.pt is of another network: .* features.1.bias"):
        Trainer(config(start=str(tmp_path / "other.pt")), tmp_path)


@pytest.mark.parametrize("engine", ["dense", "sparse"])
def test_rules_see_the_gradient_of_a_larger_batch_where_one_is_asked_for(engine, tmp_path):
    trainer = Trainer(config(density=0.05, method="rigl", update_frequency=1, update_batch=72, engine=engine), tmp_path)
    trainer.model.train()
    before = {n: v.clone() for n, v in trainer.model.state_dict().items()}
    found = update_batch.gradients(trainer, 72)
    assert all(torch.equal(v, before[n]) for n, v in trainer.model.state_dict().items())
    generator = torch.Generator().manual_seed(1_000_003)
    for index, (x, y) in enumerate(trainer.data.train.batches(32, generator)):
        if index < 3:
            x, y = (x, y) if index < 2 else (x[:8], y[:8])
            (F.cross_entropy(trainer.model(x), y, reduction="sum") / 72).backward()
    trainer.engine.stepped()
    for name, weight in trainer.host.weights.items():
        torch.testing.assert_close(found[name][trainer.host.masks[name]], weight.grad[trainer.host.masks[name]])
        assert (found[name][~trainer.host.masks[name]] != 0).any()
    seen = {}
    grow = trainer.host._rules.rules.grow
    object.__setattr__(trainer.host._rules.rules, "grow",
                       lambda layer, k: (seen.update({layer.name: layer.grad.clone()}), grow(layer, k))[1])  # fmt: skip
    trainer.model.load_state_dict(before)
    trainer._step(*next(trainer.data.train.batches(32, torch.Generator().manual_seed(5))))
    assert seen.keys() <= found.keys() and seen
    for name, grad in seen.items():
        torch.testing.assert_close(grad, found[name])


def test_an_interrupted_warm_up_goes_on_bit_for_bit(tmp_path):
    settings = config(warmup=1.5, keep_weights=[0, 1], method="rigl", death="RunningSNIP", update_frequency=3)
    whole = train(settings, tmp_path / "whole", quiet=True)
    trainer = Trainer(settings, tmp_path / "parts")
    runs.make_folder(tmp_path / "parts")
    trainer.keep_weights()
    from east_plugins.training.interrupts import Interrupt
    from east_plugins.training.progress import Progress

    with Progress(trainer, True) as progress:
        trainer.run_epoch(Interrupt(), progress)
    trainer.save()
    runs.write_config(tmp_path / "parts", trainer.options)
    parts = train(settings, tmp_path / "parts", resume=True, quiet=True)
    assert parts["weights_sha256"] == whole["weights_sha256"]
    for epoch in (0, 1):
        a, b = (checkpoints.weights(tmp_path / part / f"weights-{epoch}.pt") for part in ("whole", "parts"))
        assert all(torch.equal(a[name], b[name]) for name in a)
