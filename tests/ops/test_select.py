import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from east_plugins.ops import select
from east_plugins.ops.select import choose, lowest_k, random_k, together, top_k


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6000), st.data())
def test_top_k_takes_exactly_k_of_the_highest_eligible(n, data):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    levels = data.draw(st.integers(1, 50))  # few levels: many ties
    scores = torch.randint(levels, (n,), generator=draw).float()
    eligible = torch.rand(n, generator=draw) < data.draw(st.floats(0.01, 1))
    k = data.draw(st.integers(0, int(eligible.sum())))
    chosen = top_k(scores, k, eligible, generator())
    assert len(chosen) == k == len(chosen.unique())
    assert eligible[chosen].all()
    left = eligible.clone()
    left[chosen] = False
    if 0 < k and left.any():
        assert scores[chosen].min() >= scores[left].max()


@given(st.integers(1, 300), st.data())
def test_lowest_k_takes_the_lowest(n, data):
    scores = torch.randn(n, generator=generator(data.draw(st.integers(0, 99))))
    k = data.draw(st.integers(0, n))
    chosen = lowest_k(scores, k, torch.ones(n, dtype=torch.bool), generator())
    assert sorted(chosen.tolist()) == sorted(scores.argsort()[:k].tolist())


def test_ties_are_broken_at_random_and_repeatably():
    scores, everywhere = torch.zeros(10_000), torch.ones(10_000, dtype=torch.bool)
    first, again, other = (top_k(scores, 50, everywhere, generator(seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.max() > 5000  # not the first positions


def test_nan_scores_are_the_last_to_be_chosen():
    scores = torch.tensor([torch.nan, 1.0, torch.nan, 2.0])
    chosen = top_k(scores, 3, torch.ones(4, dtype=torch.bool), generator())
    assert {1, 3} < set(chosen.tolist())


def test_an_expanded_constant_needs_no_dense_tensor():
    scores = torch.zeros(()).expand(3, 5)
    assert len(top_k(scores, 7, torch.ones(3, 5, dtype=torch.bool), generator()).unique()) == 7


@pytest.mark.parametrize("share", [0.001, 0.5, 1.0])
def test_random_k_is_uniform(share):
    eligible = torch.rand(1000, generator=generator(3)) < share
    eligible[5] = True
    draw, hits = generator(), torch.zeros(1000)
    k = max(1, int(eligible.sum()) // 100)
    for _ in range(2000):
        hits[random_k(k, eligible, draw)] += 1
    expected = 2000 * k / int(eligible.sum())
    assert (hits[~eligible] == 0).all()
    assert ((hits[eligible] - expected).abs() < 6 * expected**0.5).all()


@given(st.integers(0, 500), st.data())
def test_choose_gives_distinct_integers(n, data):
    k = data.draw(st.integers(0, n))
    drawn = choose(n, k, generator())
    assert len(drawn.unique()) == k and (k == 0 or 0 <= drawn.min() <= drawn.max() < n)


def test_nan_scores_of_a_large_layer_still_give_exactly_k():
    """More blocks than are wanted, and ineligible positions in all of them."""
    scores, eligible = torch.full((50_000,), torch.nan), torch.rand(50_000, generator=generator()) < 0.5
    chosen = top_k(scores, 5, eligible, generator())
    assert len(chosen.unique()) == 5 and eligible[chosen].all()


@pytest.mark.parametrize("accelerator", [False, True])
def test_selections_together_are_those_one_by_one(accelerator, monkeypatch):
    """On the CPU's way and on the one of a device that is asked once for all layers."""
    draw = generator(5)
    layers = []
    for size in (40, 70_000, 3000):  # all and few of the positions wanted, ties at the boundary
        scores = torch.randint(30, (size,), generator=draw).double()
        layers += [(scores, size // 50 + 1, torch.rand(size, generator=draw) < 0.6)]
        layers += [(torch.zeros(()).expand(size), size // 50 + 1, layers[-1][2])]
    one_by_one, draws = [], generator(1)
    for layer in layers[::2]:
        one_by_one.append(top_k(*layer, draws))
    if accelerator:
        monkeypatch.setattr(select, "_asks_nothing", lambda tensor: False)
    draws = generator(1)
    for alone, at_once in zip(one_by_one, together([select.highest(*x, draws) for x in layers[::2]]), strict=True):
        assert sorted(alone.tolist()) == sorted(at_once.tolist())
    for (_, k, eligible), chosen in zip(
        layers[1::2], together([select.highest(*x, draws) for x in layers[1::2]]), strict=True
    ):
        assert len(chosen.unique()) == k and eligible[chosen].all()


@pytest.mark.parametrize("kind", ["distinct", "rounded", "mostly zero", "with NaN", "all equal"])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_large_layers_on_the_cpu_choose_what_one_pass_over_all_scores_chooses(kind, share, monkeypatch):
    """Most positions are left out by looking at blocks of them."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        n = int(torch.randint(70, 20_000, (1,), generator=generator))
        scores, eligible = torch.randn(n, generator=generator), torch.rand(n, generator=generator) < share
        if kind == "rounded":
            scores = (3 * scores).round()
        elif kind == "mostly zero":
            scores = torch.where(torch.rand(n, generator=generator) < 0.99, 0.0, scores)
        elif kind == "with NaN":
            scores[torch.rand(n, generator=generator) < 0.01] = torch.nan
        elif kind == "all equal":
            scores = torch.zeros(n)
        k = max(1, int(eligible.sum()) // int(torch.randint(1, 200, (1,), generator=generator)))
        chosen = []
        for asks_nothing in (True, False):
            monkeypatch.setattr(select, "_asks_nothing", lambda tensor, so=asks_nothing: so)
            chosen.append(select.top_k(scores, k, eligible, torch.Generator().manual_seed(5)).sort().values)
        assert torch.equal(*chosen)


@settings(deadline=None)
@given(n=st.integers(0, 20_000), share=st.sampled_from([0.0, 0.001, 0.1, 1.0]), first=st.integers(0, 9))
def test_places_of_a_mask(n, share, first):
    mask = (torch.rand(n + first, generator=torch.Generator().manual_seed(n)) < share)[first:]
    assert torch.equal(select.places(mask), mask.nonzero().flatten())
