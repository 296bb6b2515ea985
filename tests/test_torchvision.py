"""Twenty torchvision classifiers, untrained: five steps of RigL with the sparse engine are those of the dense one.

Norms have a large `eps`, since they else multiply the rounding of channels that are nearly constant by hundreds a
layer; and growth compares gradients to eight digits, since taps beside a border and dead channels have equal ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Engine, Masking, UsageError

pytestmark = pytest.mark.slow

#: Pixels of the images; all that several poolings leave one of.
NETWORKS = {
    "alexnet": 64, "convnext_tiny": 64, "densenet121": 64, "densenet169": 64, "efficientnet_b0": 64, "googlenet": 64,
    "inception_v3": 75, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64,
    "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64, "swin_t": 64, "vit_b_16": 32, "wide_resnet50_2": 64,
}  # fmt: skip
TRANSFORMERS = {"vit_b_16"}  # with q, k and v in one parameter of their module
STEPS, EVERY = 5, 3


def coarse(layer):
    """The dense gradient, as RigL has it, to eight digits."""
    gradient = layer.grad.abs()
    return (gradient * (1e8 / gradient.max().clamp(min=1e-12))).round()


coarse.east_meta = {"needs": ("grad",)}


def network(name):
    models = pytest.importorskip("torchvision").models
    more = {"vit_b_16": {"image_size": NETWORKS[name]}}.get(name, {})
    if name in ("googlenet", "inception_v3"):  # their second heads are on no path, and want larger images
        more = {"aux_logits": False, "init_weights": False}
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=5, **more).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
            nn.init.normal_(module.bias, std=0.3)
        for rate in ("p", "dropout"):  # random numbers would be others where channels are left out
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def trained(name, engine):
    model, shape = network(name), (3, NETWORKS[name], NETWORKS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    host = Masking(optimizer, death_rate=0.3, growth_mode=coarse, update_frequency=EVERY, seed=0)
    if name in TRANSFORMERS:
        with pytest.raises(UsageError, match="follows convolutions and linear layers only"):
            host.add_module(model, density=0.05, sparse_init="connected", input_shape=shape)
        host.add_module(model, density=0.05)
    else:
        host.add_module(model, density=0.05, sparse_init="connected", input_shape=shape)
    first, chosen = {name: mask.clone() for name, mask in host.masks.items()}, Engine(host, shape, engine)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(4, *shape, generator=draw, dtype=torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(5, (4,), generator=draw)).backward()
        host.step()
    assert any(not torch.equal(mask, first[name]) for name, mask in host.masks.items())
    return model, host, chosen


@pytest.mark.parametrize("name", NETWORKS)
def test_a_classifier_trains_the_same_with_every_engine(name):
    (ours, host, engine), (theirs, reference, _) = (trained(name, engine) for engine in ("sparse", "dense"))
    assert not engine.dense, engine.reason
    assert host.nonzeros == reference.nonzeros == round(0.05 * host.theoretical_size)
    for layer, mask in host.masks.items():
        assert torch.equal(mask, reference.masks[layer]), layer
        assert not ours.get_parameter(layer)[~mask].any(), layer
    for (key, found), wanted in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
