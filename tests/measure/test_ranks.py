"""Average ranks and critical distances against a textbook's example."""

import math

import pytest

from east_plugins.errors import UsageError
from east_plugins.measure import ranks

#: AUC of four variants of C4.5 on 14 data sets (Demšar 2006, Table 6; its ranks tell the two .975 of `voting` apart).
NAMES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
AUC = """
.763 .768 .771 .798  .599 .591 .590 .569  .954 .971 .968 .967  .628 .661 .654 .657  .882 .888 .886 .898
.936 .931 .916 .931  .661 .668 .609 .685  .583 .583 .563 .625  .775 .838 .866 .875  1.00 1.00 1.00 1.00
.940 .962 .965 .962  .619 .666 .614 .669  .972 .981 .9751 .975  .957 .978 .946 .970
"""


def example():
    numbers = list(map(float, AUC.split()))
    return [dict(zip(NAMES, numbers[i : i + 4], strict=True)) for i in range(0, len(numbers), 4)]


def test_average_ranks_and_the_distance_are_those_of_demsars_example():
    found = ranks.ranks(example())
    assert found.settings == 14 and found.best == "C4.5+m+cf"
    assert [round(found.average[name], 3) for name in NAMES] == [3.143, 2.0, 2.893, 1.964]
    assert round(found.distance, 2) == 1.25
    assert round(ranks.critical_distance(4, 14, alpha=0.10), 2) == 1.12
    assert not any(found.behind(name) for name in NAMES)  # the example's own: Nemenyi's test finds none at 0.05
    assert found.p_value("C4.5", "C4.5+m+cf") > 0.05


def test_critical_values_are_those_of_the_table():
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]  # Demšar 2006, Table 5(a)
    for methods, q in enumerate(table, 2):
        unit = math.sqrt(methods * (methods + 1) / 6)
        assert ranks.critical_distance(methods, 1) / unit == pytest.approx(q, abs=1e-3)
        assert ranks.p_value(ranks.critical_distance(methods, 1) / unit, methods) == pytest.approx(0.05, rel=1e-6)


def test_a_rank_behind_by_the_distance_is_behind():
    far = [{"a": 3.0, "b": 2.0, "c": 1.0}] * 20
    found = ranks.ranks(far)
    assert found.best == "a" and not found.behind("a") and found.behind("c") and found.p_value("a", "c") < 0.05


@pytest.mark.parametrize("scores", [[], [{"a": 1.0}, {"b": 1.0}]])
def test_settings_that_cannot_be_ranked_are_refused(scores):
    with pytest.raises(UsageError, match="ranks need"):
        ranks.ranks(scores)
