"""Records of masked weights, and ITOP's dictionaries as live views of them."""

import copy
import io

import pytest
import torch
from torch import nn

from east_plugins import Masking, UsageError
from east_plugins.host.layers import MaskedWeight


def host_of(model=None, **kwargs):
    model = model or nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    host = Masking(torch.optim.SGD(model.parameters(), 0.1), growth_mode="random", **kwargs)
    host.add_module(model, density=0.3)
    return host


def test_active_positions_follow_masks_that_are_written_to():
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 2] = True
    record = MaskedWeight("a", nn.Parameter(torch.ones(3, 3)), mask)
    first = record.active
    assert first.flat.tolist() == [5] and record.active is first
    record.mask[0, 0] = True
    assert record.active.flat.tolist() == [0, 5] and record.count == 2
    record.mask = torch.ones(3, 3)
    assert record.active.flat.tolist() == list(range(9)) and record.count == 9


def test_masks_that_a_script_writes_are_counted():
    host = host_of()
    host.masks["0.weight"][:] = 1.0
    assert host.name2nonzeros["0.weight"] == 48 and host.active("0.weight").flat.tolist() == list(range(48))
    host.masks["2.weight"] = torch.eye(5, 6)  # ITOP's masks are floats
    assert host.masks["2.weight"].dtype == torch.bool and host.name2nonzeros["2.weight"] == 5
    assert host.nonzeros == 53 and host.name2zeros == {"0.weight": 0, "2.weight": 25}


def test_views_read_as_dictionaries():
    host = host_of()
    assert list(host.masks) == list(host.weights) == host.names == ["0.weight", "2.weight"]
    assert {name: int(mask.sum()) for name, mask in host.masks.items()} == dict(host.name2nonzeros)
    assert not host.num_remove and "0.weight" not in host.num_remove
    host.truncate_weights()
    assert set(host.num_remove) == set(host.masks)
    assert type(copy.deepcopy(host.masks)["0.weight"]) is torch.Tensor
    with pytest.raises(KeyError):
        host.masks["no.weight"]


def test_masks_are_saved_as_a_plain_dictionary():
    host = host_of()
    file = io.BytesIO()
    torch.save(host.masks, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert list(loaded) == host.names and torch.equal(loaded["0.weight"], host.masks["0.weight"])


@pytest.mark.parametrize("table", ["masks", "fired_masks", "weights", "name2nonzeros"])
def test_popping_a_layer_stops_masking_it(table):
    host = host_of()
    host.truncate_weights()
    getattr(host, table).pop("0.weight")
    for each in (host.masks, host.fired_masks, host.weights, host.name2nonzeros, host.num_remove):
        assert list(each) == ["2.weight"]
    assert host.theoretical_size == 30


def test_removing_a_layer_forgets_all_of_it():
    host = host_of()
    host.truncate_weights()
    host.remove_weight("0")
    assert list(host.num_remove) == ["2.weight"]


def test_a_mask_of_another_shape_or_name_is_refused():
    host = host_of()
    with pytest.raises(UsageError, match=r"mask of 0\.weight: shape must be \[6, 8\], got \[8, 6\]"):
        host.masks["0.weight"] = torch.ones(8, 6)
    with pytest.raises(UsageError, match=r"'x' is not masked; known: 0\.weight, 2\.weight"):
        host.masks["x"] = torch.ones(8, 6)


@pytest.mark.parametrize(
    "call",
    [
        lambda host: host.state_dict(),
        lambda host: host.load_state_dict({}),
        lambda host: host.step(),
        lambda host: host.truncate_weights(),
        lambda host: host.remove_type(nn.Linear),
        lambda host: host.target_nonzeros(1),
    ],
)
def test_what_needs_a_model_says_so(call):
    with pytest.raises(UsageError, match="add_module"):
        call(Masking(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)))
