import torch
from torch import nn

from east_plugins.init.weights import sparse_fan_in


def test_variance_follows_the_active_fan_in_of_each_neuron():
    # Evci et al. 2022: N(0, 2 / active fan-in), inactive weights zero
    weight = nn.Parameter(torch.ones(4, 4000, dtype=torch.float64))
    mask = torch.zeros(4, 4000, dtype=torch.bool)
    for row, count in enumerate((4000, 1000, 250, 1)):
        mask[row, :count] = True
    sparse_fan_in({"w": weight}, {"w": mask}, torch.Generator().manual_seed(0))
    assert (weight[~mask] == 0).all()
    for row, count in enumerate((4000, 1000, 250)):
        variance = weight[row][mask[row]].detach().square().mean()
        assert abs(variance * count / 2 - 1) < 6 * (2 / count) ** 0.5


def test_only_the_masks_layers_and_the_generator_are_used():
    weight, other, mask = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(2)), torch.eye(3, dtype=torch.bool)
    state = torch.get_rng_state()
    sparse_fan_in({"w": weight, "other": other}, {"w": mask}, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state()) and (other == 1).all()
    first = weight.detach().clone()
    sparse_fan_in({"w": weight}, {"w": mask}, torch.Generator().manual_seed(1))
    assert torch.equal(first, weight) and (first.diagonal() != 0).all()
