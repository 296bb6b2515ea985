"""What the outputs of a network stand for: how many classes a data set has, and what they are called."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from . import tables
from .datasets import class_folders, unpickle

COUNTS = {
    "digits": 10, "mnist": 10, "fashionmnist": 10, "cifar10": 10, "cifar100": 100, "tinyimagenet": 200,
    "imagenet": 1000,
}  # fmt: skip
_FIXED = {
    "cifar10": "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck",
    "fashionmnist": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
}
_FOLDERS = {"folder": "train", "imagenet": "train", "tinyimagenet": "tiny-imagenet-200/train"}


def count(data: str, data_dir: str | Path | None = None) -> int | None:
    """Classes of the data set called `data`; of a folder, those in it; None where that cannot be told."""
    if data == "table":
        return int(tables.of_csv(Path(data_dir))[1].max()) + 1 if data_dir else 2
    return COUNTS.get(data) or len(_found(data, data_dir)) or None


def names(data: str, data_dir: str | Path | None, classes: int) -> list[str]:
    """A name for each of `classes` outputs: the data set's own, or their numbers where it has none at hand."""
    found = _FIXED[data].split(",") if data in _FIXED else _found(data, data_dir)
    return found if len(found) == classes else [str(i) for i in range(classes)]


def _found(data: str, data_dir: str | Path | None) -> list[str]:
    """The names that lie with the data, in the order of the labels."""
    if data_dir is None:
        return []
    try:
        if data == "cifar100":
            return [str(name) for name in unpickle(Path(data_dir, "cifar-100-python", "meta"))["fine_label_names"]]
        return class_folders(Path(data_dir, _FOLDERS[data]))
    except (OSError, KeyError, UsageError):
        return []
