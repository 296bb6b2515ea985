"""Recipes: the paper's text, and what the authors' own code (ES2) does; its counts to the weight."""

import dataclasses
import json
import math

import pytest
import torch
import yaml

from east_plugins import Config, Masking, share
from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.host import presets
from east_plugins.options.east import EastOptions
from east_plugins.options.methods import METHODS, RECIPES
from east_plugins.plugins.density import OpenCyclic
from east_plugins.training import models, runs

# ES2.md, section 2: ResNet-34, 10 classes, weights at the start with sharing and without, by floor
STARTS = {
    0.001: {
        "0.001": (21264, 26743),
        0.7: (23616, 23008),
        0.6: (22266, 21828),
        0.1: (21264, 21268),
        0.01: (21264, 21268),
    },
    0.0005: {
        "0.001": (14460, 22788),
        0.7: (11809, 11503),
        0.6: (11134, 10913),
        0.1: (10633, 10633),
        0.01: (10633, 10633),
    },
    0.0001: {"0.001": (11431, 21365), 0.7: (2363, 2302), 0.6: (2228, 2187), 0.1: (2126, 2127), 0.01: (2126, 2127)},
}
CASES = [
    (density, floor, shared)
    for density in (0.01, *STARTS)
    for floor in ("0.001", 0.7, 0.6, 0.1, 0.01)
    for shared in (True, False)
]


def hosted(density, shared, **options):
    model = models.build("resnet34", 10)
    model.fc.bias = None
    if shared:
        share(model)
    options = {f"sparse_init_{name}": value for name, value in options.items()}
    config = Config(method="rigl+cyclic", recipe="es2", density=density, plugin_options=options).resolve(352)
    return presets.hosted(Masking, config, model, torch.optim.SGD(model.parameters(), 0.1), (3, 32, 32))


def counts_of_es2(shapes, size, density, floor, start):
    """ES2's counts, computed here from what its code does: shares of ERK cut at a floor and at 1."""
    own = sum(math.prod(shape) for shape in shapes.values())
    adjusted = size * density / own  # all blocks' weights x density / own weights
    share_ = int(own * adjusted) / sum(sum(shape) for shape in shapes.values())
    least = floor(adjusted) if start else 0.0
    counts = {}
    for name, shape in shapes.items():
        kept = min(max(share_ * sum(shape) / math.prod(shape), least), 1.0) * math.prod(shape)
        counts[name] = int(round(kept)) if start else int(kept)
    return counts


@pytest.mark.parametrize(("density", "floor", "shared"), CASES)
def test_es2_starts_with_the_counts_of_its_code_in_every_layer(density, floor, shared):
    options = {"floor": 0.0, "least": 0.001} if floor == "0.001" else {"floor": floor}
    host = hosted(density, shared, **options)
    if density in STARTS:  # the totals that are known beside what is computed here
        assert host.nonzeros == STARTS[density][floor][0 if shared else 1]
    shapes = {name: tuple(weight.shape) for name, weight in host.weights.items()}
    least = (lambda d: 0.001) if floor == "0.001" else (lambda d: floor * d)
    assert dict(host.name2nonzeros) == counts_of_es2(shapes, host.theoretical_size, density, least, start=True)


@pytest.mark.parametrize(("density", "end"), [(0.0005, 12810), (0.0001, 2554)])
def test_nothing_closes_the_cycles_of_es2(density, end):
    host = hosted(density, shared=True)
    assert host.target_nonzeros(35_000) == host.target_nonzeros(35_201) == host.target_nonzeros(88_000) == end


def test_the_densities_of_two_cycles_are_those_of_its_code():
    schedule = OpenCyclic(
        0.0005, multiplier=10, cycles=2, length=17_600, cyclic_frequency=350, frequency=4000, end=88_001
    )
    updates = [step for step in range(1, 88_001) if schedule.due(step)]
    inside = [step for step in updates if step <= 35_200]
    assert inside == list(range(350, 35_001, 350)) and updates[100:103] == [35_350, 36_000, 40_000]
    assert updates[-1] == 88_000
    for step in inside:
        position = (step - 1) % 17_600 / 17_600
        swing = 2 * position if position <= 0.5 else 2 * (1 - position)
        assert schedule.density(step) == pytest.approx(0.0005 + 0.0045 * swing, rel=1e-12)
        assert not schedule.replaces(step)
    assert schedule.replaces(35_350) and schedule.density(60_000) == schedule.density(35_000)


def test_info_prints_what_es2_really_trains(capsys):
    command = "info --recipe es2 --model resnet34 --density 0.0001 --json".split()
    assert main(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*command, "--east-share"]) == 0
    shared = json.loads(capsys.readouterr().out)
    assert (plain["nonzeros_start"], shared["nonzeros_start"], shared["nonzeros_end"]) == (2127, 2126, 2554)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_has_every_recipe_and_it_comes_back_from_yaml(method, recipe, tmp_path):
    found = Config(method=method, recipe=recipe, epochs=25).resolve(21)
    runs.write_config(tmp_path, found)
    assert runs.read_config(tmp_path).resolve(21) == found
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["recipe"] == recipe


def test_what_is_given_by_hand_goes_before_the_recipe():
    found = Config(method="east", recipe="es2", epochs=8, nesterov=False, sparse_init="ERK", lr_drops=[2.0]).resolve(50)
    assert (found.nesterov, found.sparse_init, found.lr_drops, found.clip_norm) == (False, "ERK", [2.0], 1.0)


def test_settings_of_a_trick_that_is_off_are_left_out():
    found = Config(method="rigl", recipe="es2", epochs=8).resolve(50)
    assert not found.east.any and not found.east.cyclic_open and found.east.share_scale == "one"


def test_every_setting_of_a_recipe_has_a_source():
    for recipe in RECIPES.values():
        assert recipe.help and all(source for _, source in recipe.settings.values())


@pytest.mark.parametrize(
    "wrong", [dict(recipe="es3"), dict(clip_norm=0), dict(clip_norm_of="all"), dict(tested="first")], ids=str
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        Config(method="rigl", **wrong)


def test_recipe_east_is_es2s_with_cycles_that_close_at_the_target():
    def of(recipe):
        return Config(method="east", recipe=recipe, model="resnet34", density=0.001, epochs=30).resolve(352)

    es2, east = of("es2"), of("east")
    assert (es2.east.cyclic_open, east.east.cyclic_open) == (True, False)
    assert dataclasses.replace(east, recipe="es2", east=dataclasses.replace(east.east, cyclic_open=True)) == es2
    assert (east.clip_norm, east.clip_norm_of, east.nesterov) == (1.0, "all", True)


def test_east_is_trained_by_its_own_recipe_and_all_others_as_the_papers_text_says():
    east = Config(method="east").resolve(21)
    assert (east.recipe, east.clip_norm, east.nesterov, east.bias_free_head) == ("east", 1.0, True, True)
    assert Config(method="east+connected").resolve(21).sparse_init == "connected"
    rigl = Config(method="rigl").resolve(21)
    assert (rigl.recipe, rigl.clip_norm, rigl.nesterov, rigl.sparse_init) == ("paper", None, False, "ERK")


@pytest.mark.parametrize("given", [dict(dyrelu_type="mish"), dict(dyrelu_replaces="relu,gelu")], ids=str)
def test_coefficients_are_blended_where_there_are_any(given):
    """EAST's recipe blends DyReLU's; what is no DyReLU, or stands in for no ReLU, is blended by outputs."""
    blends = [
        Config(method="east", density=0.05, epochs=9, east=EastOptions(**options)).resolve(10).east.dyrelu_blend
        for options in ({}, given)
    ]
    assert blends == ["coefficients", "outputs"]
