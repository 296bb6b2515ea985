"""Packed states: the same bits in fewer bytes."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from east_plugins.ops.packing import KEY, pack, unpack

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def same_bits(a, b):
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 9999), st.sampled_from([(2048,), (7, 11, 23), (3, 1001)])
)
def test_what_is_unpacked_has_the_bits_of_what_was_packed(dtype, density, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < density
    tensor = (100 * torch.randn(shape, generator=generator)).to(dtype) * kept.to(dtype)
    assert same_bits(unpack(pack(tensor)), tensor)


def test_zeros_with_a_sign_infinities_and_no_numbers_survive():
    tensor = torch.zeros(64, 64)
    tensor[3, 5], tensor[4, 4], tensor[63, 63] = -0.0, torch.inf, torch.nan
    packed = pack(tensor)
    assert len(packed["values"]) == 3 and same_bits(unpack(packed), tensor)


def test_a_state_is_gone_through_and_only_what_gains_is_packed():
    dense, sparse = torch.randn(64, 64), torch.zeros(64, 64)
    sparse[0, 0] = 1
    state = {"a": OrderedDict(w=sparse, v=dense), "list": [sparse, 3], "pair": (sparse.bool(), "x"), "none": None}
    state["a"]._metadata = {"": {"version": 2}}
    packed = pack(state)
    assert KEY in packed["a"]["w"] and KEY in packed["list"][0] and KEY in packed["pair"][0]
    assert packed["a"]["v"] is dense and packed["a"]._metadata == {"": {"version": 2}} and state["a"]["w"] is sparse
    found = unpack(packed)
    assert isinstance(found["a"], OrderedDict) and found["a"]._metadata == {"": {"version": 2}}
    assert torch.equal(found["a"]["w"], sparse) and found["list"][1] == 3 and isinstance(found["pair"], tuple)


def test_truth_values_take_a_bit_each_at_most(tmp_path):
    for density, most in ((0.5, 0.13), (0.001, 0.01)):
        mask = torch.rand(100_000) < density
        torch.save(pack(mask), tmp_path / "mask.pt")
        assert (tmp_path / "mask.pt").stat().st_size < most * 100_000 + 2000
        assert torch.equal(unpack(torch.load(tmp_path / "mask.pt", weights_only=True)), mask)


@pytest.mark.parametrize(
    "change, said",
    [
        ({KEY: 2}, "version 2, known is 1"),
        ({"shape": [2, 2]}, "places outside"),
        ({"places": torch.tensor([-1, 3])}, "places outside"),
        ({"bits": torch.zeros(9, dtype=torch.uint8)}, "has 72 bits"),
    ],
)
def test_a_form_that_cannot_be_is_refused(change, said):
    tensor = torch.zeros(64, 64)
    tensor[5, 5], tensor[6, 6] = 1, 2
    with pytest.raises(ValueError, match=said):
        unpack({**pack(tensor), **change})
