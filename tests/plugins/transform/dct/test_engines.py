import logging
import math

import pytest
import torch

from east_plugins.plugins.transform.dct import DCTConv2d, DCTLinear, engines, transform
from east_plugins.plugins.transform.dct.live import find


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(engines, "_plans", {})
    monkeypatch.setattr(transform, "_made", {})


@pytest.fixture
def fast(monkeypatch):
    """Every fast engine counts as faster than the dense one."""
    monkeypatch.setattr(engines, "MARGIN", math.inf)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(engines, "MARGIN", 0)


def test_live_part_in_the_order_of_the_matrix():
    weight = torch.zeros(5, 4, 3, 3)
    weight[3, 1, 0, 2] = 1
    weight[0, 2, 0, 2] = 2
    weight[3, 0, 1, 1] = -1e-20
    live = find(weight)
    assert live.rows.tolist() == [0, 3] and live.channels.tolist() == [1, 2, 0]
    assert live.taps == [0, 0, 2, 0, 1, 0, 0, 0, 0]
    assert live.weight.tolist() == torch.tensor([[0, 2, 0], [1, 0, -1e-20]]).tolist()


def test_live_part_of_nothing_is_a_zero():
    live = find(torch.zeros(3, 4))
    assert live.rows.tolist() == live.channels.tolist() == [0] and live.weight.tolist() == [[0]]


def test_live_part_holds_values_that_are_no_numbers():
    weight = torch.zeros(40, 30)
    weight[2, 1] = math.nan
    weight[1, 0] = math.inf
    live = find(weight)
    assert live.rows.tolist() == [1, 2] and live.channels.tolist() == [0, 1] and live.weight[1].isnan().any()


def test_live_part_gives_up_over_the_limit():
    weight = torch.zeros(64, 8, 2, 2)
    weight[:2, :4] = 1
    assert find(weight, 0.5)
    weight[0, 4, 0, 0] = 1
    assert find(weight, 0.5) is None  # 17 columns of 32
    weight.fill_(1)
    assert find(weight, 0.99) is None
    assert find(weight).weight.shape == (64, 32)


def test_auto_is_dense_where_nothing_is_faster(slow):
    layer = DCTConv2d(3, 8, 3)
    assert engines.choose(layer, torch.randn(1, 3, 5, 5)) == ("dense", None)


def test_auto_takes_what_is_faster_while_s_is_sparse(fast):
    layer = DCTLinear(8, 8)
    x = torch.randn(2, 8)
    name, live = engines.choose(layer, x)
    assert name == "fft" and live.rows.tolist() == [0]
    layer.weight.data.fill_(1)
    torch.testing.assert_close(layer(x), x @ layer.effective_weight().T + layer.bias)
    assert engines.choose(layer, x)[0] == "dense"


def test_a_layer_that_is_too_dense_is_looked_at_again_after_a_while(fast):
    layer = DCTLinear(8, 8)
    x = torch.randn(2, 8)
    layer.weight.data.fill_(1)
    assert engines.choose(layer, x)[0] == "dense"
    layer.weight.data.zero_()
    names = [engines.choose(layer, x)[0] for _ in range(engines.REST + 1)]
    assert names == ["dense"] * engines.REST + ["fft"]


def test_measured_once_a_size_and_apart_for_training(fast, caplog):
    caplog.set_level(logging.INFO, "east_plugins")
    x = torch.randn(4, 3, 6, 6)
    for _ in range(3):
        DCTConv2d(3, 4, 3)(x)
    assert len(caplog.records) == 1
    with torch.no_grad():
        DCTConv2d(3, 4, 3)(x)
    assert len(caplog.records) == 2
    DCTConv2d(3, 4, 3)(torch.randn(16, 3, 6, 6))
    assert len(caplog.records) == 3


def test_measuring_leaves_no_gradients_and_draws_nothing(fast):
    layer = DCTConv2d(3, 4, 3)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    state = torch.get_rng_state()
    layer(x)
    assert layer.weight.grad is layer.alpha.grad is layer.bias.grad is x.grad is None
    assert not layer.weight.any() and torch.equal(torch.get_rng_state(), state)


def test_layers_in_channels_last(fast):
    layer = DCTConv2d(8, 6, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    layer.weight.data[2, 1] = 1
    assert engines.choose(layer, x)[0] != "dense"
    torch.testing.assert_close(layer(x), layer.product(x, layer.effective_weight(), layer.bias), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ["fft", "separable"])
def test_only_the_gradients_that_are_asked_for(engine):
    layer = DCTConv2d(4, 6, 3, engine=engine)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad.any()
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad.any()


def test_the_matrix_is_not_kept_where_a_fast_engine_is_taken(fast):
    layer = DCTConv2d(3, 4, 3)
    layer(torch.randn(2, 3, 6, 6)).sum().backward()
    assert all(key[0] != "matrix" for key in transform._made)


def test_dense_where_auto_may_not_choose(fast):
    x = torch.randn(2, 4, 6, 6)
    assert engines.choose(DCTConv2d(4, 4, 3, groups=2), x)[0] == "dense"
    layer = DCTConv2d(4, 4, 3)
    torch.use_deterministic_algorithms(True)
    try:
        assert engines.choose(layer, x)[0] == "dense"
    finally:
        torch.use_deterministic_algorithms(False)
    assert engines.choose(layer, x)[0] != "dense"


@pytest.mark.slow
def test_auto_is_fast_on_wide_layers_at_extreme_sparsity():
    """With one thread processor time is measured, and both are clear: twice as fast, three times as slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            wide = DCTConv2d(512, 512, 3, padding=1)
            assert engines.choose(wide, torch.randn(32, 512, 4, 4))[0] in ("fft", "separable")
            assert engines.choose(DCTConv2d(3, 16, 3), torch.randn(16, 3, 8, 8))[0] == "dense"
    finally:
        torch.set_num_threads(threads)
