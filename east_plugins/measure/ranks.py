"""Average ranks of several methods over settings, and which of them differ (Friedman and Nemenyi; Demšar 2006)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import MissingExtraError, UsageError

ALPHA = 0.05


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods, 1 the best, over `settings` settings, and the critical distance at level 0.05."""

    average: dict[str, float]
    settings: int

    @property
    def distance(self) -> float:
        """Ranks that differ by less are not significantly different (Nemenyi)."""
        return critical_distance(len(self.average), self.settings)

    @property
    def best(self) -> str:
        return min(self.average, key=lambda name: self.average[name])

    def behind(self, name: str) -> bool:
        """Whether a method's rank is significantly behind the best one's."""
        return self.average[name] - self.average[self.best] >= self.distance

    def p_value(self, a: str, b: str) -> float:
        """Of the Nemenyi test for two of the methods."""
        unit = _unit(len(self.average), self.settings)
        return p_value(abs(self.average[a] - self.average[b]) / unit, len(self.average))


def ranks(scores: Sequence[Mapping[str, float]]) -> Ranks:
    """Average ranks over settings, each with a score for every method, higher is better; equal scores share theirs.

    Raises `UsageError` for no setting, or methods that differ from setting to setting.
    """
    if not scores or any(each.keys() != scores[0].keys() for each in scores):
        raise UsageError("ranks need at least one setting, and the same methods in each")
    names = list(scores[0])
    rows = [_stats().rankdata([-each[name] for name in names]) for each in scores]
    return Ranks({n: float(sum(row[i] for row in rows) / len(rows)) for i, n in enumerate(names)}, len(rows))


def critical_distance(methods: int, settings: int, alpha: float = ALPHA) -> float:
    """Nemenyi's: q sqrt(k (k + 1) / (6 N)), q the Studentized range statistic over sqrt(2) (Demšar 2006, 3.2.2);
    infinite for one method, which has none to differ from."""
    if methods < 2:
        return math.inf
    q = float(_stats().studentized_range.ppf(1 - alpha, methods, math.inf)) / math.sqrt(2)
    return q * _unit(methods, settings)


def p_value(z: float, methods: int) -> float:
    """Of a difference of `z` standard errors between two of so many average ranks."""
    return float(_stats().studentized_range.sf(z * math.sqrt(2), methods, math.inf))


def _unit(methods: int, settings: int) -> float:
    return math.sqrt(methods * (methods + 1) / (6 * settings))


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("ranks need scipy: pip install 'east_plugins[study]'") from error
    return stats
