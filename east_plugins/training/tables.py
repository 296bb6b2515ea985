"""Tabular data: rows of numbers with a label, from a CSV file, OpenML, or a small table that scikit-learn ships."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingExtraError, UsageError

LABELS = ("class", "label", "target")  #: names of a column that is the label, wherever it stands; else the last one
TEST = 0.15  #: share of the rows, of every class, that is the test set (Nowak et al. 2023, Table 4)


def embedded() -> tuple[Tensor, Tensor]:
    """scikit-learn's breast cancer table: 569 rows of 30 numbers, two classes."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    return _rows(features), torch.from_numpy(labels).long()


def of_csv(path: Path) -> tuple[Tensor, Tensor]:
    """Rows of a CSV file, with or without a line of names; labels may be words. Raises `UsageError` naming the line."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"`data_dir` {path} cannot be read as CSV: {error}") from error
    if not lines or len(lines[0][1]) < 2:
        raise UsageError(f"`data_dir` {path}: expected are lines of numbers and a label, joined by commas")
    names = [] if _is_numbers(lines[0][1][:-1]) else [name.strip().lower() for name in lines[0][1]]
    at = next((i for i, name in enumerate(names) if name in LABELS), len(lines[0][1]) - 1)
    features, labels = [], []
    for number, line in lines[bool(names) :]:
        values = [*line[:at], *line[at + 1 :]]
        if len(line) != len(lines[0][1]) or not _is_numbers(values):
            raise UsageError(
                f"`data_dir` {path}, line {number}: expected are {len(lines[0][1]) - 1} numbers and a label"
            )
        features.append([float(value) for value in values])
        labels.append(line[at].strip())
    return _checked(_rows(np.array(features)), _numbered(labels), f"`data_dir` {path}")


def of_openml(name: str, cache: Path | None, download: bool) -> tuple[Tensor, Tensor]:
    """A data set of openml.org by its name or number, kept in the folder `cache`; only what is there is read unless
    `download` is said. Columns that are no numbers are refused, by `UsageError`."""
    try:
        from sklearn.datasets import fetch_openml, get_data_home
    except ImportError as error:
        raise MissingExtraError(
            f"`data` openml:{name} needs scikit-learn: pip install 'east_plugins[train]'"
        ) from error
    home = Path(cache or get_data_home())
    if not download and not (home / "openml").is_dir():
        raise UsageError(f"`data` openml:{name}: nothing of it is in {home}; `download` gets it from openml.org")
    which = {"data_id": int(name)} if name.isdecimal() else {"name": name}
    try:
        found = fetch_openml(**which, data_home=str(home), as_frame=False, parser="liac-arff")
        rows = _rows(np.asarray(found.data, dtype=np.float64))
    except Exception as error:  # of the network, of the file, or a table of words
        raise UsageError(f"`data` openml:{name} cannot be read: {' '.join(str(error).split())[:160]}") from error
    return _checked(rows, _numbered(found.target), f"`data` openml:{name}")


def _rows(features: np.ndarray) -> Tensor:
    """float32 [N, F, 1, 1]: an image of one pixel with a channel for each feature."""
    return torch.from_numpy(np.asarray(features, dtype=np.float32))[:, :, None, None]


def _numbered(labels: Iterable[object]) -> Tensor:
    """Classes as numbers, in the order of their names; those that are numbers in the order of these."""
    words = [str(label) for label in labels]
    names = sorted(set(words), key=lambda word: (0, float(word), word) if _is_numbers([word]) else (1, 0.0, word))
    places = {name: i for i, name in enumerate(names)}
    return torch.tensor([places[word] for word in words], dtype=torch.long)


def _checked(rows: Tensor, labels: Tensor, source: str) -> tuple[Tensor, Tensor]:
    if not bool(rows.isfinite().all()):
        raise UsageError(f"{source}: values must be finite numbers")
    if not 2 <= len(labels.unique()) <= len(labels) // 2:
        raise UsageError(f"{source}: {len(labels.unique())} classes in {len(labels)} rows; the label must tell classes")
    return rows, labels


def _is_numbers(values: Sequence[str]) -> bool:
    try:
        [float(value) for value in values]
    except ValueError:
        return False
    return True
