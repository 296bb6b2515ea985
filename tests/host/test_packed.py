"""Steps on active values: the optimizer's own numbers, its state dict as ever."""

import pytest
import torch
from torch import nn

from east_plugins.host.packed import PackedState
from east_plugins.ops.active import Active

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def make(optimizer):
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(6, 5, 3, 3).double()), nn.Parameter(torch.randn(7).double())
    mask = torch.rand(weight.shape) < 0.1
    with torch.no_grad():
        weight.mul_(mask)
    return weight, other, mask, OPTIMIZERS[optimizer]([weight, other])


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_values_and_state_are_those_of_the_masked_dense_step(optimizer, layout):
    weight, other, mask, packed = make(optimizer)
    weight.data = weight.data.contiguous(memory_format=layout)
    dense_weight, dense_other, _, dense = make(optimizer)
    state, active = PackedState(packed), Active(mask)
    where = weight.data_ptr()
    for step in range(5):
        gradients([weight, other], step)
        gradients([dense_weight, dense_other], step)
        dense_weight.grad.mul_(mask)
        with state.stepping({weight: active}):
            packed.step()
            assert [p.shape for p in packed.param_groups[0]["params"]] == [(len(active) + 7,)], "one vector for all"
        dense.step()
        torch.testing.assert_close(weight.data, dense_weight.data, rtol=1e-14, atol=1e-14)
        assert torch.equal(other, dense_other) and weight.data_ptr() == where
        assert weight.grad.shape == weight.shape and (weight.grad[~mask] != 0).any()
    ours, theirs = packed.state_dict(), dense.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for index in theirs["state"]:
        torch.testing.assert_close(ours["state"][index], theirs["state"][index], rtol=1e-14, atol=1e-14)
    assert weight not in packed.state, "no dense state is kept"
    assert all(a is b for a, b in zip(packed.param_groups[0]["params"], [weight, other], strict=True))


def test_a_dense_state_dict_is_taken_up():
    weight, other, mask, packed = make("momentum")
    dense_weight, dense_other, _, dense = make("momentum")
    gradients([dense_weight, dense_other], 0)
    dense_weight.grad.mul_(mask)
    dense.step()
    weight.data, other.data = dense_weight.data.clone(), dense_other.data.clone()
    state = PackedState(packed)
    packed.load_state_dict(dense.state_dict())
    gradients([weight, other], 1)
    gradients([dense_weight, dense_other], 1)
    dense_weight.grad.mul_(mask)
    with state.stepping({weight: Active(mask)}):
        packed.step()
    dense.step()
    torch.testing.assert_close(weight, dense_weight)


def test_state_moves_with_the_active_set_and_back_to_dense():
    weight, other, mask, optimizer = make("momentum")
    state, before = PackedState(optimizer), Active(mask)
    gradients([weight, other], 0)
    with state.stepping({weight: before}):
        optimizer.step()
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    moved = mask.clone()
    moved.view(-1)[before.flat[:2]] = False
    moved.view(-1)[(~mask).flatten().nonzero()[:3]] = True
    state.move(weight, Active(moved))
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], momentum * moved)
    gradients([weight, other], 1)
    with state.stepping({weight: None}):
        assert weight.dim() == 4
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum * moved)


def test_small_parameters_join_from_any_group_and_keep_their_own_settings():
    def make(packing):
        torch.manual_seed(0)
        weight, norm, late = (nn.Parameter(torch.randn(shape).double()) for shape in [(9, 4, 3, 3), (9,), (5,)])
        groups = [{"params": [weight]}, {"params": [norm, late], "weight_decay": 0.0, "lr": 0.01}]
        optimizer = torch.optim.Adam(groups, lr=0.1, weight_decay=0.1)
        return weight, norm, late, optimizer, PackedState(optimizer) if packing else None

    (weight, norm, late, optimizer, state), (*dense, reference, _) = make(True), make(False)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    active = Active(mask)
    weight.data.mul_(mask)
    dense[0].data.mul_(mask)
    for step in range(6):
        for some in ((weight, norm, late), dense):
            gradients(some[: 2 if step < 3 else 3], step)  # the last one joins with fewer steps behind it
        dense[0].grad.mul_(mask)
        with state.stepping({weight: active}):
            optimizer.step()
        reference.step()
    for ours, theirs in zip((weight, norm, late), dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    ours, theirs = optimizer.state_dict()["state"], reference.state_dict()["state"]
    for index in theirs:
        torch.testing.assert_close(ours[index], theirs[index], rtol=1e-13, atol=1e-13)
    assert not optimizer.state, "nothing is kept twice"


def test_a_failing_step_leaves_the_parameter_whole():
    weight, other, mask, optimizer = make("sgd")
    gradients([weight, other], 0)
    before, gradient = weight.detach().clone(), weight.grad
    with pytest.raises(RuntimeError), PackedState(optimizer).stepping({weight: Active(mask)}):
        raise RuntimeError
    assert torch.equal(weight, before) and weight.grad is gradient
