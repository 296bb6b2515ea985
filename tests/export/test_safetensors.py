import pytest
import torch
from torch import nn

from east_plugins import UsageError, export
from east_plugins.ops.maskable import maskable
from east_plugins.plugins.allocation.layerwise import budgets, random_mask
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models


def masked(model, total, seed=0):
    """ERK masks with `total` active weights, applied."""
    generator = torch.Generator().manual_seed(seed)
    weights = maskable(model)
    counts = budgets("ERK", {name: w.shape for name, w in weights.items()}, total)
    masks = {name: random_mask(w.shape, counts[name], generator) for name, w in weights.items()}
    for name, mask in masks.items():
        weights[name].data.masked_fill_(~mask, 0)
    return masks


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loads_back_bit_for_bit(tmp_path, dtype):
    model = models.build("resnet20", 10, width=4)
    masks = masked(model, 300)
    model.to(dtype).conv1.weight.data[masks["conv1.weight"]] = float("nan")
    model.fc.bias.data[0] = float("-inf")
    path = tmp_path / "a.safetensors"
    path.write_bytes(export.to_safetensors(model, masks))
    loaded, loaded_masks = export.load_sparse(path, models.build("resnet20", 10, width=4).to(dtype))
    assert not loaded.training
    assert all(torch.equal(bits(t), bits(loaded.state_dict()[n])) for n, t in model.state_dict().items())
    assert loaded_masks.keys() == masks.keys() and all(torch.equal(loaded_masks[n], masks[n]) for n in masks)


def test_weights_that_masks_leave_out_are_not_stored(tmp_path):
    model = nn.Linear(4, 3)
    mask = torch.eye(3, 4, dtype=torch.bool)
    (tmp_path / "a").write_bytes(export.to_safetensors(model, {"weight": mask}))
    loaded, _ = export.load_sparse(tmp_path / "a", nn.Linear(4, 3))
    assert torch.equal(loaded.weight, model.weight * mask) and torch.equal(loaded.bias, model.bias)


@pytest.mark.parametrize("mask", [torch.zeros(3, 4), torch.ones(3, 4)])
def test_empty_and_full_masks(tmp_path, mask):
    (tmp_path / "a").write_bytes(export.to_safetensors(nn.Linear(4, 3), {"weight": mask.bool()}))
    _, masks = export.load_sparse(tmp_path / "a", nn.Linear(4, 3))
    assert torch.equal(masks["weight"], mask.bool())


def test_shared_weights_are_stored_once(tmp_path):
    model = models.build("resnet20", 10, width=8)
    plain = len(export.to_safetensors(model, {}))
    share(model)
    content = export.to_safetensors(model, masked(model, 2000))
    assert len(export.to_safetensors(model, {})) < 0.8 * plain
    (tmp_path / "a").write_bytes(content)
    empty = models.build("resnet20", 10, width=8)
    share(empty)
    loaded, _ = export.load_sparse(tmp_path / "a", empty)
    assert loaded.layer1[1].conv1.weight is loaded.layer1[2].conv1.weight
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_size_of_resnet34_at_9999():
    """At most 60 KB beside the norms' own numbers."""
    model = models.build("resnet34", 10)
    masks = masked(model, round(0.0001 * sum(w.numel() for w in maskable(model).values())))
    norms = sum(
        tensor.numel() * tensor.element_size()
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for tensor in module.state_dict().values()
    )
    assert len(export.to_safetensors(model, masks)) - norms < 60_000


def test_broken_files_are_refused_in_one_line(tmp_path):
    good = export.to_safetensors(nn.Linear(4, 3), {})
    (tmp_path / "cut").write_bytes(good[:-20])
    (tmp_path / "text").write_text("no such thing")
    (tmp_path / "good").write_bytes(good)
    (tmp_path / "other").write_bytes(export.to_safetensors(nn.Linear(5, 3), {}))
    reasons = dict.fromkeys(("missing", "cut", "text"), "cannot be read") | {"other": "another network"}
    for name, reason in reasons.items():
        with pytest.raises(UsageError, match=reason) as error:
            export.load_sparse(tmp_path / name, nn.Linear(4, 3))
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="pass the model"):
        export.load_sparse(tmp_path / "good")
