"""Residual branches that begin silent: which norms, on any network, and that they learn."""

import pytest
import torch
from torch import nn

from east_plugins.errors import NothingMatchedError, UsageError
from east_plugins.plugins.transform.quiet import quiet
from east_plugins.plugins.transform.sharing import share
from east_plugins.training import models

SHAPE = (3, 16, 16)


def last_norms(stages, blocks, opening=True):
    return [f"layer{i}.{j}.bn2" for i in range(1, stages + 1) for j in range(blocks) if opening or i == 1 or j > 0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("branches, opening", [("all", True), ("loops", False)])
def test_the_norm_at_the_end_of_every_block_starts_at_zero(branches, opening, shared):
    model = models.build("resnet20", 10)
    if shared:
        share(model)
    expected = last_norms(3, 3, opening)
    assert quiet(model, SHAPE, branches) == expected
    zero = [
        n.removesuffix(".weight")
        for n, p in model.named_parameters()
        if ".bn" in n and (p == 0).all() and "weight" in n
    ]
    assert zero == expected


def test_networks_from_elsewhere_have_other_names():
    model = models.build("torchvision:resnet18", 10, image_size=64)
    assert quiet(model, (3, 64, 64)) == last_norms(4, 2)
    found = quiet(models.build("torchvision:mobilenet_v2", 10, image_size=64), (3, 64, 64))
    assert len(found) == 10 and all(name.endswith(".conv.3") for name in found)


def test_a_quiet_network_computes_its_shortest_path():
    torch.manual_seed(0)
    model = models.build("resnet20", 10).eval()
    quiet(model, SHAPE)
    x = torch.randn(2, *SHAPE)
    before = model(x)
    with torch.no_grad():
        model.layer2[1].conv1.weight.normal_()
    assert torch.equal(model(x), before)


def test_every_quiet_scale_leaves_zero_with_the_first_step():
    torch.manual_seed(0)
    model = models.build("resnet20", 10)
    found = quiet(model, SHAPE)
    model(torch.randn(8, *SHAPE)).logsumexp(1).sum().backward()
    assert all((model.get_parameter(f"{name}.weight").grad != 0).all() for name in found)


@pytest.mark.parametrize("name", ["vgg16", "wrn-16-2", "mlp"])
def test_networks_without_such_a_norm_are_refused_and_unchanged(name):
    model = models.build(name, 10, image_size=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NothingMatchedError, match="quiet_branches"):
        quiet(model, SHAPE)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class ReluBehind(nn.Module):
    """Norm, then ReLU, then the addition: with a scale of zero the ReLU would pass no gradient."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.norm(self.conv(x)).relu()).mean((2, 3)))


def test_a_scale_that_could_not_learn_stays():
    with pytest.raises(NothingMatchedError):
        quiet(ReluBehind(), SHAPE)


def test_an_unknown_choice_is_refused():
    with pytest.raises(UsageError, match="all, loops"):
        quiet(models.build("resnet20", 10), SHAPE, "some")
