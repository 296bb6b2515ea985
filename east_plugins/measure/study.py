"""What the runs of a study say: accuracies, ranks, exploration, and how alike the criteria's choices are."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..ops import checkpoints
from ..plugins import registry
from ..training import runs
from ..training.images import Kept
from ..training.study import Cell
from ..training.trainer import Trainer
from .ranks import Ranks, ranks
from .similarity import expected_mean_jaccard, expected_shared, mean_jaccard, shared

Masks = Mapping[str, Tensor]
Pairs = dict[tuple[str, str], list[float]]  #: a value a seed of every pair of criteria

START, EXPECTED = "start", "expected"  #: rows of similarities beside the criteria


def rows(done: Sequence[tuple[Cell, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One record a run, in the order of the cells."""
    return [
        {
            "criterion": cell.criterion, "growth": cell.growth, "density": cell.density, "period": cell.period,
            "seed": cell.seed, "nonzeros": summary["nonzeros"], "test_accuracy": summary["test_accuracy"],
            "validation_accuracy": summary["best_validation_accuracy"], "itop_rate": summary["itop_rate"],
            "effective_density": summary["effective_density"], "diverged": bool(summary.get("diverged")),
            "run": cell.job.out.name,
        }
        for cell, summary in done
    ]  # fmt: skip


def means(records: Sequence[Mapping[str, Any]], value: str) -> dict[tuple[str, str, float, int], tuple[float, float]]:
    """Mean and standard deviation over seeds (0 for one) of a column, by criterion, growth, density and period."""
    found: dict[tuple[str, str, float, int], list[float]] = {}
    for record in records:
        key = record["criterion"], record["growth"], record["density"], record["period"]
        found.setdefault(key, []).append(record[value])
    return {
        key: (statistics.fmean(some), statistics.stdev(some) if len(some) > 1 else 0.0) for key, some in found.items()
    }


def average_ranks(done: Sequence[tuple[Cell, Mapping[str, Any]]], low: float) -> dict[str, Ranks]:
    """Ranks of the criteria by mean test accuracy over all settings of growth, density and period, over those with
    densities up to `low`, and over those above; a part without settings is left out, as are settings in which a
    criterion's runs are missing."""
    criteria = list(dict.fromkeys(cell.criterion for cell, _ in done if not cell.baseline))
    scores: dict[tuple[str, float, int], dict[str, float]] = {}
    accuracies = means(rows(done), "test_accuracy")
    for (criterion, growth, density, period), (mean, _) in accuracies.items():
        if criterion in criteria:
            scores.setdefault((growth, density, period), {})[criterion] = mean
    whole = {key: each for key, each in scores.items() if len(each) == len(criteria)}
    parts = {
        "all densities": list(whole.values()),
        f"densities up to {low:g}": [each for key, each in whole.items() if key[1] <= low],
        f"densities over {low:g}": [each for key, each in whole.items() if key[1] > low],
    }
    return {name: ranks(some) for name, some in parts.items() if some and len(criteria) > 1}


def final_masks(cells: Sequence[Cell]) -> dict[str, dict[int, Masks]]:
    """Masks at the end of training, by criterion and seed."""
    found: dict[str, dict[int, Masks]] = {}
    for cell in cells:
        found.setdefault(cell.criterion, {})[cell.seed] = checkpoints.end_of(cell.job.out)[1]
    return found


def end_similarity(cells: Sequence[Cell], kept: Kept | None = None) -> Pairs:
    """Jaccard index, the mean over layers, of the final masks of every two criteria with the same seed, with the masks
    that both began with (`start`), and what it is expected to be of random masks (`expected`). `cells` differ in
    criterion and seed only; `kept` as of `training.images.load`."""
    masks = final_masks(cells)
    starts = {cell.seed: _start(cell, kept) for cell in cells if cell.criterion == cells[0].criterion}
    everywhere = {name: mask | ~mask for name, mask in next(iter(starts.values())).items()}
    found = _pairs({**masks, START: starts})
    for name, each in masks.items():
        found[name, EXPECTED] = [expected_mean_jaccard(each[s], starts[s], everywhere) for s in each]
    return found


def _start(cell: Cell, kept: Kept | None) -> Masks:
    return {name: mask.clone() for name, mask in _trainer(cell, kept).host.masks.items()}


def _trainer(cell: Cell, kept: Kept | None) -> Trainer:
    options = cell.job.options
    return Trainer(options, cell.job.out, runs.load_data(options, kept))


def _pairs(masks: Mapping[str, Mapping[int, Masks]]) -> Pairs:
    return {
        (a, b): [mean_jaccard(masks[a][seed], masks[b][seed]) for seed in masks[a] if seed in masks[b]]
        for a, b in itertools.product(masks, repeat=2)
    }


def choice_similarity(cells: Sequence[Cell], kept: Kept | None = None) -> Pairs:
    """Jaccard index, the mean over layers, of the weights that every two criteria choose for removal in one network
    state, of each seed: at the first topology update, of the first criterion's run. `expected`: what is expected of
    random choices of as many. Criteria that average over steps are left out, as each would need a run of its own."""
    chosen: dict[str, dict[int, Masks]] = {name: {} for name in _choosing(cells)}
    firsts = {cell.seed: cell for cell in reversed(cells) if cell.criterion == next(iter(chosen), None)}
    expected: dict[str, list[float]] = {name: [] for name in chosen}
    for seed, cell in sorted(firsts.items()):
        trainer = _trainer(cell, kept)
        next(trainer.updates())
        for name, masks in _choices(trainer, cells).items():
            chosen[name][seed] = masks
            expected[name].append(expected_mean_jaccard(masks, masks, trainer.host.masks))
    return {**_pairs(chosen), **{(name, EXPECTED): some for name, some in expected.items()}}


def choices_over_time(cells: Sequence[Cell], every: int, kept: Kept | None = None) -> list[dict[str, Any]]:
    """How alike the choice of a criterion and those of the others are at every `every`-th topology update of its run,
    from the first on (Nowak et al. 2023, Figure 18): one record an update and pair, with the Jaccard index of the
    weights chosen for removal and what is expected of random choices. Not symmetric: the state is that of the run of
    `criterion`. The first seed's run of each criterion is trained again for it. `cells` differ in criterion and seed
    only; criteria that average over steps are left out."""
    found = []
    for criterion in _choosing(cells):
        cell = next(cell for cell in cells if cell.criterion == criterion)
        trainer = _trainer(cell, kept)
        for number, step in enumerate(trainer.updates()):
            if number % every:
                continue
            chosen = _choices(trainer, cells)
            mine = chosen.pop(criterion)
            random = expected_mean_jaccard(mine, mine, trainer.host.masks)
            found += [{"criterion": criterion, "other": name, "step": step, "jaccard": mean_jaccard(mine, masks),
                       "expected": random} for name, masks in chosen.items()]  # fmt: skip
    return found


def _choosing(cells: Sequence[Cell]) -> list[str]:
    return [name for name in dict.fromkeys(cell.criterion for cell in cells) if not _averages(name)]


def _choices(trainer: Trainer, cells: Sequence[Cell]) -> dict[str, Masks]:
    """The weights that each criterion would remove in the present state, were it asked at the host's rate."""
    options = {cell.criterion: cell.job.options.plugin_options for cell in cells}
    scope, rate = trainer.options.prune_scope, trainer.host.death_rate
    return {
        name: trainer.host.removed_by(name, rate, scope, **{
            key.removeprefix("death_"): v for key, v in options[name].items() if key.startswith("death_")
        })
        for name in _choosing(cells)
    }  # fmt: skip


def _averages(criterion: str) -> bool:
    return "average" in registry.pruning.entry(criterion).meta.get("needs", ())


def common(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One record a seed: the share of the kept weights that all criteria keep at the end, of the removed ones that all
    remove, and what both are expected to be of random masks. `cells` differ in criterion and seed only."""
    masks = final_masks(cells)
    seeds = set.intersection(*(set(each) for each in masks.values()))
    if not seeds:
        raise UsageError("no seed has a run of every criterion")
    found = []
    for seed in sorted(seeds):
        each = [masks[name][seed] for name in masks]
        (kept, removed), (kept_of_random, removed_of_random) = shared(each), expected_shared(each)
        found.append({
            "seed": seed, "kept_by_all": kept, "removed_by_all": removed,
            "kept_by_all_of_random": kept_of_random, "removed_by_all_of_random": removed_of_random,
        })  # fmt: skip
    return found
