"""Similarity of sets: identical, disjoint, and random ones against the closed form."""

import math

import pytest
import torch

from east_plugins.errors import UsageError
from east_plugins.measure.similarity import (
    expected_jaccard,
    expected_mean_jaccard,
    expected_shared,
    jaccard,
    mean_jaccard,
    shared,
)


def drawn(count, size, generator):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=generator)[:count]] = True
    return mask


def test_identical_sets_have_1_and_disjoint_ones_0():
    a = {"x": torch.tensor([True, False, True]), "y": torch.tensor([[True], [False]])}
    b = {name: ~mask for name, mask in a.items()}
    assert jaccard(a, a) == mean_jaccard(a, a) == 1 and jaccard(a, b) == mean_jaccard(a, b) == 0
    c = {"x": torch.tensor([True, True, False]), "y": a["y"]}
    assert mean_jaccard(a, c) == pytest.approx((1 / 3 + 1) / 2) and jaccard(a, c) == pytest.approx(2 / 4)
    with pytest.raises(UsageError, match="different networks"):
        mean_jaccard(a, {"x": a["x"]})


@pytest.mark.parametrize("a, b, n", [(20, 20, 100), (5, 60, 64), (300, 100, 1000), (1, 1, 2)])
def test_random_sets_agree_with_the_expected_index_within_sampling_error(a, b, n):
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([
        jaccard({"x": drawn(a, n, generator)}, {"x": drawn(b, n, generator)}) for _ in range(2000)
    ]).double()  # fmt: skip
    assert abs(found.mean() - expected_jaccard(a, b, n)) < 4 * found.std() / math.sqrt(len(found))


def test_the_expected_index_is_the_mean_over_all_pairs_and_near_its_closed_form():
    pairs = [(i & j).bit_count() / (i | j).bit_count() for i in range(32) for j in range(32)
             if i.bit_count() == 2 and j.bit_count() == 3]  # fmt: skip
    assert expected_jaccard(2, 3, 5) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert expected_jaccard(7, 7, 7) == 1 and expected_jaccard(0, 3, 9) == 0 and expected_jaccard(0, 0, 9) == 1
    for p, q in ((0.2, 0.2), (0.5, 0.1)):
        n = 2_000_000
        assert expected_jaccard(int(p * n), int(q * n), n) == pytest.approx(p * q / (p + q - p * q), rel=1e-5)
    with pytest.raises(UsageError, match="sets of 3 and 9 of 8"):
        expected_jaccard(3, 9, 8)


def test_shares_that_all_masks_keep_and_remove():
    masks = [{"x": torch.tensor(row, dtype=torch.bool)} for row in ([1, 1, 0, 0, 0], [1, 0, 1, 0, 0])]
    assert shared(masks) == (1 / 2, 2 / 3)
    generator = torch.Generator().manual_seed(0)
    random = [[{"x": drawn(300, 1000, generator), "y": drawn(50, 1000, generator)} for _ in range(3)]
              for _ in range(300)]  # fmt: skip
    found = torch.tensor([shared(each) for each in random]).double()
    expected = torch.tensor(expected_shared(random[0])).double()
    assert ((found.mean(0) - expected).abs() < 4 * found.std(0) / math.sqrt(len(found))).all()
    everywhere = {name: torch.ones_like(mask) for name, mask in random[0][0].items()}
    assert expected_mean_jaccard(random[0][0], random[0][1], everywhere) == pytest.approx(
        (expected_jaccard(300, 300, 1000) + expected_jaccard(50, 50, 1000)) / 2
    )
