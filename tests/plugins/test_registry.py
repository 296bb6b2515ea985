import sys
import types

import pytest

from east_plugins import Masking, growth
from east_plugins.__main__ import main
from east_plugins.errors import DuplicateNameError, UnknownNameError, UsageError
from east_plugins.plugins.registry import ALL, Registry


def test_a_duplicate_name_is_refused():
    registry = Registry("growth")
    registry.register("mine")(len)
    with pytest.raises(DuplicateNameError, match="Mine"):
        registry.register("Mine")(max)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean gradient"):
        growth.get("gradeint")


def test_case_and_dashes_do_not_matter():
    assert growth.get("Random-Unfired") is growth.get("random_unfired")


def test_found_by_module_and_attribute(monkeypatch):
    module = types.ModuleType("somebodys_rules")
    module.largest = lambda layer: layer.weight.abs()
    monkeypatch.setitem(sys.modules, "somebodys_rules", module)
    assert growth.get("somebodys_rules:largest") is module.largest
    for wrong in ("somebodys_rules:missing", "no_such_module:rule"):
        with pytest.raises(UsageError, match="cannot be imported"):
            growth.get(wrong)


@pytest.mark.parametrize("spec", [":x", ".x:y", "broken_syntax:rule", "raises_when_imported:rule", "math:"])
def test_a_spec_that_cannot_be_imported_is_one_line(spec, tmp_path, monkeypatch):
    (tmp_path / "broken_syntax.py").write_text("def rule(:")
    (tmp_path / "raises_when_imported.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="cannot be imported") as error:
        growth.get(spec)
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)


def test_found_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text("def rule(layer):\n    'Grows by luck.'\n    return layer.weight.abs()\n")
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[east_plugins.growth]\nluck = plugged:rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = Registry("growth").entry("luck")
    assert (entry.name, entry.help, entry.source) == ("luck", "Grows by luck.", "entry point plugged:rule")


def test_a_rule_says_what_it_needs_wherever_it_is_found(monkeypatch):
    module = types.ModuleType("needy")

    def rule(layer):
        return layer.momentum.abs()

    rule.east_meta = {"needs": ("momentum",)}
    module.rule = rule
    monkeypatch.setitem(sys.modules, "needy", module)
    assert growth.entry("needy:rule").meta == {"needs": ("momentum",)}


RULE = """
from east_plugins import growth

@growth.register("{name}", needs=("grad",))
def {name}(layer):
    '''Largest gradient among weights that were never active.'''
    return layer.grad.abs() * ~layer.fired
"""


def test_a_registered_rule_is_given_its_gradient_by_module_and_attribute(tmp_path, monkeypatch):
    import torch
    from torch import nn

    (tmp_path / "rules_of_the_readme.py").write_text(RULE.format(name="gradient_to_unfired"))
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Linear(10, 10)
    rule = "rules_of_the_readme:gradient_to_unfired"
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode=rule, death_rate=0.5, update_frequency=1)
    host.add_module(model, density=0.1)
    model(torch.ones(1, 10)).sum().backward()
    host.step()
    assert growth.get(rule).east_meta == growth.entry("gradient_to_unfired").meta == {"needs": ("grad",)}


def test_a_registered_rule_can_be_an_entry_point_of_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "packaged.py").write_text(RULE.format(name="packaged_rule"))
    info = tmp_path / "packaged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packaged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[east_plugins.growth]\npackaged_rule = packaged:packaged_rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry("growth")
    monkeypatch.setattr("east_plugins.plugins.registry.growth", fresh)
    assert fresh.entry("packaged_rule").meta == {"needs": ("grad",)}


def test_the_command_line_finds_modules_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "rule_in_the_working_folder.py").write_text("def rule(layer):\n    return layer.weight\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert main("info --model cnn --width 4 --density 0.2 --growth rule_in_the_working_folder:rule".split()) == 0


def test_every_plugin_has_a_line_of_help():
    for registry in ALL:
        assert registry.names()
        for entry in registry.entries():
            assert entry.help and "\n" not in entry.help and entry.source


def test_a_rule_is_registered_and_used_in_ten_lines():
    import torch
    from torch import nn

    name = "by_column"
    if name not in growth.names():

        @growth.register(name)
        def by_column(layer):
            return torch.arange(layer.weight.shape[1]).float().expand_as(layer.weight)

    model = nn.Linear(10, 10)
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode=name, death_rate=0.5)
    host.add_module(model, density=0.1)
    model(torch.ones(1, 10)).sum().backward()
    before = host.masks["weight"].clone()
    host.truncate_weights()
    assert (host.masks["weight"] & ~before).nonzero()[:, 1].min() >= 8
