import copy

import pytest
import torch
from torch import nn

from east_plugins.errors import NothingMatchedError, UsageError
from east_plugins.host.masking import Masking
from east_plugins.ops.maskable import maskable
from east_plugins.plugins import registry
from east_plugins.plugins.transform import dct, sharing
from east_plugins.training import models


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


X = torch.randn(2, 3, 8, 8)


def test_conv_and_linear_layers_become_dct_layers_with_their_parameters():
    model = network()
    names, before = list(maskable(model)), dict(model.named_parameters())
    assert dct.convert(model) == ["0", "3", "5"]
    assert [type(model[i]) for i in (0, 3, 5)] == [dct.DCTConv2d, dct.DCTConv2d, dct.DCTLinear]
    assert list(maskable(model)) == names
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert after.keys() - before.keys() == {"0.alpha", "3.alpha", "5.alpha"}
    assert not any(model[i].weight.any() for i in (0, 3, 5)) and model[0].bias.any()
    assert model(X).shape == (2, 5)


def test_registered_as_dctps():
    assert registry.transform.get("dctps") is dct.convert


@pytest.mark.parametrize("match, expected", [("3", ["3"]), (["0", "5"], ["0", "5"]), ("[0-3]", ["0", "3"])])
def test_only_layers_whose_name_matches(match, expected):
    model = network()
    assert dct.convert(model, match) == expected
    assert sum(isinstance(module, dct.DCTLayer) for module in model) == len(expected)


def test_alpha_of_all_of_one_and_fixed():
    model = network()
    dct.convert(model, alpha=0.5)
    assert model[0].alpha == model[5].alpha == 0.5
    model = network().double()
    dct.convert(model, alpha={"3": 0.25}, trainable=False)
    assert (model[0].alpha, model[3].alpha) == (1, 0.25) and model[3].alpha.dtype == torch.float64
    assert not any("alpha" in name for name, _ in model.named_parameters())


def test_optimizer_and_scheduler_made_before_go_on():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    dct.convert(model, optimizer=optimizer)
    model(X).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert model[0].weight.any() and model[0].alpha != 1


def test_masked_training_keeps_s_sparse_and_its_count_exact():
    model = network()
    dct.convert(model)
    mask = Masking(
        torch.optim.Adam(model.parameters(), 1e-2), death_mode="magnitude", growth_mode="gradient", update_frequency=2
    )
    mask.add_module(model, density=0.2)
    assert set(mask.masks) == {"0.weight", "3.weight", "5.weight"}
    wanted = round(0.2 * sum(weight.numel() for weight in maskable(model).values()))
    for _ in range(6):
        mask.optimizer.zero_grad()
        model(X).square().sum().backward()
        mask.step()
    assert sum(int(m.sum()) for m in mask.masks.values()) == wanted
    for name, weight in maskable(model).items():
        assert not weight[~mask.masks[name]].any()


def test_materialize_gives_plain_layers_that_compute_the_same():
    model = network().double()
    plain = set(model.state_dict())
    dct.convert(model, alpha=0.7)
    with torch.no_grad():
        for layer in (model[0], model[3], model[5]):
            layer.weight.normal_()
    model.eval()
    weight, expected = model[0].weight, model(X.double())
    assert dct.materialize(model) == ["0", "3", "5"]
    torch.testing.assert_close(model(X.double()), expected, atol=1e-10, rtol=0)
    assert [type(model[i]) for i in (0, 3, 5)] == [nn.Conv2d, nn.Conv2d, nn.Linear]
    assert set(model.state_dict()) == plain and model[0].weight is weight
    assert vars(model[0]).keys() == vars(network()[0]).keys()
    dct.convert(model)  # and forward again


def test_twice_is_refused_and_nothing_changes():
    model = network()
    dct.convert(model, "0")
    with pytest.raises(UsageError, match="already"):
        dct.convert(model)
    assert type(model[3]) is nn.Conv2d


def test_published_layers_are_refused():
    model = network()
    model.dct = nn.Conv2d(3, 3, 1)
    with pytest.raises(UsageError, match="already"):
        dct.convert(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda: dct.convert(network(), "layer9*"),
        lambda: dct.convert(nn.Sequential(nn.ReLU())),
        lambda: dct.convert(nn.MultiheadAttention(8, 2)),  # it reads its layer's weight, its forward is not called
        lambda: dct.materialize(network()),
    ],
)
def test_says_when_nothing_matched(call):
    with pytest.raises(NothingMatchedError, match="`dctps`"):
        call()


def test_shared_weights_are_refused_with_the_reason():
    model = models.build("resnet34", 10, width=4)
    sharing.share(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="prevent conflicts with the DCT matrices"):
        dct.convert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    language_model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    language_model[1].weight = language_model[0].weight
    with pytest.raises(UsageError, match="cannot be used on 1,"):
        dct.convert(language_model)


def test_sharing_after_it_is_refused():
    model = models.build("resnet34", 10, width=4)
    dct.convert(model)
    with pytest.raises(UsageError, match="prevent conflicts"):
        sharing.share(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(engine="quick"), "auto, dense, fft, separable"),
        (dict(alpha={"1": 0.5}), "'1', which is none of 0, 3, 5"),
        (dict(optimizer=torch.optim.SGD([torch.zeros(1)], 0.1)), "no parameter of the model"),
    ],
)
def test_wrong_options_leave_the_model_unchanged(options, message):
    model = network()
    with pytest.raises(UsageError, match=message):
        dct.convert(model, **options)
    assert type(model[0]) is nn.Conv2d and model[0].weight.any()


def test_layers_with_a_forward_or_weight_of_their_own_are_left():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    model = nn.ModuleList([Scaled(3, 3, 1), normed, encoder, nn.Linear(4, 4)])
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        expected = encoder.eval()(x)
        assert dct.convert(model) == ["3"]
        torch.testing.assert_close(encoder(x), expected)


def test_the_model_may_be_a_layer():
    layer = nn.Linear(3, 4)
    assert dct.convert(layer) == [""]
    assert isinstance(copy.deepcopy(layer), dct.DCTLinear)
