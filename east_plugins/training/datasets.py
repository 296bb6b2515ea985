"""Data sets on disk: each reader returns training and test images with their labels.

Images come as a uint8 tensor [N, C, H, W], or, too large to be kept in memory, as an array of paths.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingExtraError, UnknownNameError, UsageError
from ..ops.files import replacing
from . import tables

log = logging.getLogger(__name__)

LARGEST_IN_MEMORY = 64  # pixels
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

Labelled = tuple[Tensor | np.ndarray, Tensor]
Splits = tuple[Labelled, Labelled]


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images brought to `size` x `size` pixels."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the rest and of a random `share` of every class, at least one image of each if any."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    wanted = (share * counts).round().clamp(min=1 if share else 0)
    chosen = place < wanted.repeat_interleave(counts)
    return order[~chosen].sort().values, order[chosen].sort().values


def open_image(path: str | Path):
    """The PIL image at `path`, decoded; raises `UsageError` where it cannot be."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise UsageError(f"`data_dir`: {path} is no readable image") from error


def _digits(root: None, size: int | None) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("`data` digits needs scikit-learn: pip install 'east_plugins[train]'") from error
    pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = resize((pixels * (255 / 16)).round().byte().view(-1, 1, 8, 8), size or 16), labels.long()
    train, test = stratified(labels, 0.2, seed=0)  # the source has no test set of its own
    return (images[train], labels[train]), (images[test], labels[test])


def _table(path: Path | None, size: int | None) -> Splits:
    return _split(tables.of_csv(path) if path else tables.embedded())


def _openml(name: str, download: bool, cache: Path | None, size: int | None) -> Splits:
    return _split(tables.of_openml(name, cache, download))


def _split(rows: tuple[Tensor, Tensor]) -> Splits:
    """Training and test rows: these sources have no test set of their own."""
    features, labels = rows
    train, test = stratified(labels, tables.TEST, seed=0)
    return (features[train], labels[train]), (features[test], labels[test])


def _mnist(folder: str, root: Path, size: int | None) -> Splits:
    def read(part: str, values: str, header: int, item: int) -> Tensor:
        path = _require(root, Path(folder, "raw", f"{part}-{values}-ubyte"))
        content = np.fromfile(path, dtype=np.uint8)
        if len(content) <= header or (len(content) - header) % item:
            raise UsageError(f"`data_dir`: {path} is no {folder} file, or not a whole one")
        return torch.from_numpy(content[header:])

    def labelled(part: str) -> Labelled:
        images = read(part, "images-idx3", 16, 28 * 28).view(-1, 1, 28, 28)
        labels = read(part, "labels-idx1", 8, 1).long()
        if len(labels) != len(images):
            raise UsageError(f"`data_dir`: {root / folder} has {len(images)} {part} images and {len(labels)} labels")
        return resize(images, size or 28), labels

    return labelled("train"), labelled("t10k")


def _cifar(folder: str, key: str, train: Sequence[str], test: Sequence[str], root: Path, size: int | None) -> Splits:
    """Checksums are not compared, so that images compressed anew can be used too."""

    def labelled(files: Sequence[str]) -> Labelled:
        batches = [_batch(_require(root, Path(folder, name)), key) for name in files]
        images = torch.from_numpy(np.concatenate([images for images, _ in batches])).view(-1, 3, 32, 32)
        return resize(images, size or 32), torch.tensor([label for _, labels in batches for label in labels])

    return labelled(train), labelled(test)


def _batch(path: Path, key: str) -> tuple[np.ndarray, list[int]]:
    """uint8 images [N, 3072] and their labels."""
    content = unpickle(path)
    images, labels = (content.get(name) if isinstance(content, dict) else None for name in ("data", key))
    if (
        not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,)
        or not isinstance(labels, list) or len(labels) != len(images)
    ):  # fmt: skip
        raise UsageError(f"`data_dir`: {path} is no CIFAR batch; expected are data, uint8 [N, 3072], and N {key}")
    return images, labels


def unpickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except (UsageError, OSError):
        raise
    except Exception as error:  # broken bytes lead a pickle to whatever there is
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UsageError(f"`data_dir`: {path} is damaged: {reason}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain values only: a pickle that nobody has checked could run anything."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise UsageError(f"`data_dir`: a CIFAR file holds {module}.{name}; expected are arrays and lists only")


def _folders(train: str, test: str, root: Path, size: int | None) -> Splits:
    """Class folders `train`/<class>/... and `test`/<class>/...; the classes are train's, in sorted order."""
    root = _require(root, Path(train)).parent
    classes = class_folders(root / train)
    parts = [_list(_require(root, Path(part)), classes) for part in (train, test)]
    return _decoded(root, parts, size)


def _tinyimagenet(root: Path, size: int | None) -> Splits:
    """The published archive; its labelled `val` images are the test set, as its own test labels are secret."""
    root = _require(root, Path("tiny-imagenet-200"))
    classes = class_folders(_require(root, Path("train")))
    lines = _require(root, Path("val", "val_annotations.txt")).read_text().splitlines()
    names, labels = zip(*(line.split("\t")[:2] for line in lines), strict=True)
    test = [str(root / "val" / "images" / name) for name in names], [classes.index(label) for label in labels]
    return _decoded(root, [_list(root / "train", classes), test], size)


def class_folders(folder: Path) -> list[str]:
    """Names of the classes, in the order of the labels."""
    return sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))


def _list(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Sorted paths of all images in the class folders of `folder`, and their labels."""
    if extra := set(class_folders(folder)) - set(classes):
        raise UsageError(f"`data_dir`: {folder} has a class that the training images lack: {min(extra)}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            os.path.join(where, file)
            for where, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(EXTENSIONS)
        )
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UsageError(f"`data_dir`: no images in {folder}; expected are <class>/*{{{','.join(EXTENSIONS)}}}")
    return paths, labels


def _decoded(root: Path, parts: Sequence[tuple[list[str], list[int]]], size: int | None) -> Splits:
    """The images of both parts, decoded and kept in a file in `root`, or their paths where they are large."""
    first = open_image(parts[0][0][0])
    width, height = (size, size) if size else first.size
    if max(width, height) > LARGEST_IN_MEMORY:
        return tuple((np.array(paths), torch.tensor(labels)) for paths, labels in parts)
    cache, key = root / f".east_plugins_{width}x{height}.npz", _fingerprint(root, parts)
    arrays = _read_cache(cache, key)
    if arrays is None:
        log.info("decoding the images in %s", root)
        mode = _mode(parts[0])
        arrays = [_decode(paths, mode, width, height, fit=size is not None) for paths, _ in parts]
        _write_cache(cache, key, arrays)
    return tuple((torch.from_numpy(a), torch.tensor(y)) for a, (_, y) in zip(arrays, parts, strict=True))


def _mode(part: tuple[list[str], list[int]]) -> str:
    """`L` where the first training image of every class is grey, else `RGB`."""
    paths, labels = part
    firsts = np.unique(labels, return_index=True)[1]
    return "L" if all(open_image(paths[i]).mode in ("1", "L", "LA") for i in firsts) else "RGB"


def _decode(paths: Sequence[str], mode: str, width: int, height: int, fit: bool) -> np.ndarray:
    """uint8 [N, C, H, W]; `fit` crops and resizes what has another size, else that is an error."""
    from PIL import ImageOps

    out = np.empty((len(paths), len(mode), height, width), dtype=np.uint8)  # a mode has a letter a channel

    def read(i: int) -> None:
        image = open_image(paths[i]).convert(mode)
        if image.size != (width, height):
            if not fit:
                sizes = f"{image.width}x{image.height} pixels, others {width}x{height}"
                raise UsageError(f"`image_size` is needed: {paths[i]} has {sizes}")
            image = ImageOps.fit(image, (width, height))
        out[i] = np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(paths))):
            pass
    return out


def _fingerprint(root: Path, parts: Sequence[tuple[list[str], list[int]]]) -> str:
    """Changes when a file is added, removed, renamed or changed."""
    digest = hashlib.sha256()
    for path in (path for paths, _ in parts for path in paths):
        state = os.stat(path)
        digest.update(f"{path.removeprefix(str(root))}|{state.st_size}|{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _read_cache(path: Path, key: str) -> list[np.ndarray] | None:
    try:
        with np.load(path) as cached:
            return [cached["train"], cached["test"]] if cached["key"] == key else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, key: str, arrays: Sequence[np.ndarray]) -> None:
    try:
        with replacing(path) as unfinished:
            np.savez(unfinished, key=key, train=arrays[0], test=arrays[1])
    except OSError as error:
        log.info("decoded images are not kept: %s", error)


def _require(root: Path, part: Path) -> Path:
    """`part` in `root`, or where `root` is one folder too deep or too high, in the right one."""
    inside = [place for place in root.iterdir() if place.is_dir() and not place.name.startswith(".")]
    above = [root.parent] if root.resolve().name == part.parts[0] else []
    for place in (root, *above, *(inside if len(inside) == 1 else ())):
        if (place / part).exists():
            return place / part
    names = sorted(place.name for place in root.iterdir())
    there = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    raise UsageError(f"`data_dir` {root}: {part} is missing there; it holds {there}")


class Source(NamedTuple):
    """`read(folder, image size)`; what the folder must hold; whether a mirrored image means the same; the
    torchvision class that can download it; whether a shifted image is still whole (digits fill theirs); channels
    and pixels of an image's side, where the name says them; whether it is a table of numbers, which may come from a
    file."""

    read: Callable[[Path | None, int | None], Splits]
    needs: str
    flip: bool
    torchvision: str = ""
    crop: bool = True
    shape: tuple[int, int] | None = None
    table: bool = False


_cifar10 = partial(_cifar, "cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
_cifar100 = partial(_cifar, "cifar-100-python", "fine_labels", ["train"], ["test"])

SOURCES = {
    "digits": Source(_digits, "", False, crop=False, shape=(1, 16)),
    "mnist": Source(partial(_mnist, "MNIST"), "MNIST/raw/train-images-idx3-ubyte ...", False, "MNIST", shape=(1, 28)),
    "fashionmnist": Source(
        partial(_mnist, "FashionMNIST"),
        "FashionMNIST/raw/train-images-idx3-ubyte ...",
        True,
        "FashionMNIST",
        shape=(1, 28),
    ),
    "cifar10": Source(_cifar10, "cifar-10-batches-py/data_batch_1 ...", True, "CIFAR10", shape=(3, 32)),
    "cifar100": Source(_cifar100, "cifar-100-python/train and test", True, "CIFAR100", shape=(3, 32)),
    "tinyimagenet": Source(_tinyimagenet, "tiny-imagenet-200/train/<class>/ and val/", True, shape=(3, 64)),
    "imagenet": Source(partial(_folders, "train", "val"), "train/<class>/ and val/<class>/", True, shape=(3, 224)),
    "folder": Source(partial(_folders, "train", "test"), "train/<class>/ and test/<class>/", True),
    "table": Source(_table, "", False, crop=False, table=True),
}
OPENML = "openml:"


def source_of(name: str, download: bool = False) -> Source:
    """Where the data set called `name` comes from; raises `UnknownNameError`."""
    if name.startswith(OPENML) and name != OPENML:
        return Source(partial(_openml, name.removeprefix(OPENML), download), "", False, "openml", False, table=True)
    if name not in SOURCES:
        raise UnknownNameError("`data`", name, [*SOURCES, "openml:<name>"])
    return SOURCES[name]
