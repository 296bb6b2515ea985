"""What is the matter with a run, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NEAR_CHANCE = 1.2  # times chance: what is less says nothing
SHOWN = 3  # names of layers


def verdict(entry: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], classes: int | None = None) -> str:
    """One line: whether the network is dead, diverged, at chance or well, which layers nothing passes through, and
    since when.

    `entry` is one of `analyze`, `metrics` are the lines of its `metrics.jsonl`.
    """
    if not metrics and not entry["layers"]:
        return "not an epoch is over yet"
    found = [words for words in (_diverged(metrics), _dead(entry, metrics) or _broken(entry, metrics)) if words]
    accuracy = entry["test_accuracy"] if entry["test_accuracy"] is not None else entry["validation_accuracy"]
    if classes and accuracy is not None and accuracy < NEAR_CHANCE / classes:
        found.append(f"at chance: {accuracy:.1%} with {classes} classes")
    if not found:
        share = entry["effective_density"] / entry["density"] if entry["density"] else 0.0
        found.append(f"well: {share:.0%} of the active weights lie on a path from input to output")
    return "; ".join(found)


def _diverged(metrics: Sequence[Mapping[str, Any]]) -> str:
    first = next((line["epoch"] for line in metrics if line["loss"] is None), None)
    return "" if first is None else f"diverged: the loss is not finite since epoch {first}, try a smaller learning rate"


def _dead(entry: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    if entry["effective_density"] or not entry["nonzeros"]:
        return ""
    since = _since(metrics, lambda line: line["effective_density"] == 0)
    return f"dead: no active weight lies on a path from input to output{since}; try +connected behind the method"


def _broken(entry: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    broken = [layer["name"] for layer in entry["layers"] if not layer["on_path"]]
    if not broken:
        return ""
    names = [name + _since(metrics, lambda line, name=name: line["layers"][name][1] == 0) for name in broken[:SHOWN]]
    more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    return f"nothing passes through {len(broken)} of {len(entry['layers'])} layers: {', '.join(names)}{more}"


def _since(metrics: Sequence[Mapping[str, Any]], is_so: Any) -> str:
    """Since which epoch it has been so without a break; nothing where that was not recorded or is not so at the end."""
    began = None
    for line in reversed(metrics):
        try:
            if not is_so(line):
                break
        except KeyError:
            return ""
        began = line["epoch"]
    return "" if began is None else f" since epoch {began}"
