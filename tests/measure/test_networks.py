"""The networks that are timed."""

import json

import pytest
import torch

from east_plugins.errors import UnknownNameError
from east_plugins.measure import checks, gpu
from east_plugins.measure.networks import MASKS, Subject, for_inference
from east_plugins.ops.maskable import theoretical_size

SMALL = Subject("resnet20", 10, 0.1, width=4, image_size=16)


@pytest.mark.parametrize("masks", MASKS)
def test_masks_have_exactly_the_density_and_are_the_same_every_time(masks):
    drawn, again = (Subject("resnet20", 10, 0.1, masks, width=4, image_size=16).drawn for _ in range(2))
    assert sum(int(mask.sum()) for mask in drawn.values()) == round(0.1 * theoretical_size(SMALL.build().model))
    assert all(torch.equal(mask, again[name]) for name, mask in drawn.items())


def test_networks_of_one_subject_have_the_same_values():
    a, b = (SMALL.build(channels_last) for channels_last in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_a_network_for_inference_has_its_masks_and_no_dead_norm():
    model, masks = for_inference(SMALL)
    assert not model.training
    weights = dict(model.named_parameters())
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
    assert all(buffer.std() > 0 for name, buffer in model.named_buffers() if name.endswith("running_mean"))


def test_unknown_masks_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean connected"):
        Subject(masks="conected")


@pytest.mark.parametrize(
    "kind", ["dense", "ours", "ours, engine auto", "EAST, DyReLU", "EAST, DyReLU fading", "EAST, after"]
)
def test_every_candidate_of_the_gpu_checks_trains(kind, tmp_path):
    setting = gpu.Setting(str(tmp_path / "out.json"), "resnet20", "cpu", 8, 4, 0.1)
    step = gpu.candidates(setting)[kind]()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    total, issued = gpu.timed(step, 2)
    assert 0 < issued <= total
    assert any(not torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


def test_a_part_of_the_gpu_checks_is_described_by_its_command(tmp_path):
    setting = gpu.Setting(str(tmp_path / "out.json"), "resnet20", itop="checkout")
    *words, part, described = gpu.command("steps", setting)
    assert words == ["-m", "east_plugins.measure.gpu"] and part == "steps"
    assert gpu.Setting(**json.loads(described)) == setting


def test_without_a_checkout_the_tests_are_not_run_and_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    part = checks._tested("tests on CUDA", 5, ["tests/test_cuda.py"], tmp_path)
    row = {"median_ms": 2.0, "issued_ms": 1.0, "ratio": 1.2, "synchronisations": 3}
    steps = {"resnet34": {"state": "ok", "rows": {"ours": row}}}
    updates = {"resnet50": {"state": "exit 1", "rows": {"gradient": row}}}
    result = {"device": "a GPU", "torch": "2", "seconds": 9.0, "tiny": False, "tests": {"tests on CUDA": part},
              "steps": steps, "updates": updates}  # fmt: skip
    said = checks.as_text(result)
    assert "not run: the tests lie in a checkout" in said
    assert "1.03 MISSED" in said and "30 met" in said and "resnet50: exit 1" in said
