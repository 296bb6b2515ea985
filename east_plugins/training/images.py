"""Image data sets by name, split into training, validation and test images.

Images of up to 64 pixels are decoded once and kept as bytes on the device; every batch is cropped, flipped and
normalised there, so that loading never starves training. Larger ones are decoded in worker processes as they are
needed. The validation images are taken from the training images; the test images are nobody else's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..ops.vision import import_torchvision
from .datasets import SOURCES, Labelled, Source, Splits, open_image, source_of, stratified

Kept = dict[tuple[str, str, int | None], Splits]  #: what was read last, by name, folder and size

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(eq=False)
class _Set:
    """Labelled images; `mean` and `std` are the training images', per channel, of values 0 to 255."""

    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Number of training batches an epoch. A last batch of one image, which batch norm cannot take, is left
        out; which image that is changes from epoch to epoch."""
        return len(range(0, len(self) - 1, batch_size))

    def to(self, device: torch.device | str):
        """The same images, all tensors on `device`; batches come on the device of the set."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **tensors)

    def _normalise(self, images: Tensor, channels_last: bool) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        images = images.to(torch.float32, copy=True)  # a table's rows are of that type already
        return images.sub_(self.mean).div_(self.std).contiguous(memory_format=layout)


@dataclass(eq=False)
class Images(_Set):
    """Small images, uint8 [N, C, H, W], or rows of a table, float32 [N, C, 1, 1], in memory. In training, an image is
    shifted by up to `padding` pixels in each direction, black coming in, and flipped left to right half of the time
    where `flip`."""

    images: Tensor
    padding: int = 0
    flip: bool = False
    mode: str = "zero"

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, channels_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised float images and their labels.

        With a (CPU) `generator`: `steps(batch_size)` batches, shuffled and augmented, every image in its own
        way, the same again for the same state of the generator. Without: all images in order, as they are.
        """
        if generator is None:
            for start in range(0, len(self), batch_size):
                part = slice(start, start + batch_size)
                yield self._normalise(self.images[part], channels_last), self.labels[part]
            return
        device, count = self.labels.device, len(self)
        order = torch.randperm(count, generator=generator).to(device)  # drawn for the epoch, copied once
        shift = torch.randint(2 * self.padding + 1, (2, count), generator=generator).to(device)
        mirror = (torch.rand(count, generator=generator) < 0.5 * self.flip).to(device)
        for step in range(self.steps(batch_size)):
            part = slice(step * batch_size, (step + 1) * batch_size)
            images = _crop(self.images[order[part]], *shift[:, part], mirror[part], self.padding, self.mode)
            yield self._normalise(images, channels_last), self.labels[order[part]]


class Batches:
    """Shuffled training batches of images to go through again and again, by a generator of their own: what is read
    here changes nothing in the batches that are trained on."""

    def __init__(self, images: _Set, batch_size: int, seed: int, channels_last: bool = False):
        self._images, self._size, self._channels_last = images, batch_size, channels_last
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._images.batches(self._size, self._generator, self._channels_last)


def _crop(images: Tensor, top: Tensor, left: Tensor, mirror: Tensor, padding: int, mode: str) -> Tensor:
    """Every image at its own offset in its padded self, mirrored where told."""
    count, channels, height, width = images.shape

    def index(size: int) -> Tensor:
        return torch.arange(size, device=images.device)

    rows = top[:, None] + index(height)
    columns = left[:, None] + torch.where(mirror[:, None], index(width).flip(0), index(width))
    each, channel = index(count)[:, None, None, None], index(channels)[:, None, None]
    if mode == "reflect":  # of whole numbers PyTorch pads with constants only
        along = [torch.arange(-padding, size + padding, device=images.device).abs() for size in (height, width)]
        along = [torch.where(at < size, at, 2 * size - 2 - at) for at, size in zip(along, (height, width), strict=True)]
        padded = images[:, :, along[0][:, None], along[1]]
    else:
        padded = F.pad(images, [padding] * 4)
    return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


@dataclass(eq=False)
class ImageFiles(_Set):
    """Large images, decoded as they are needed and brought to `size` x `size` pixels. In training: a random part
    of the image (8 to 100 % of its area) and a flip half of the time; else its centre (He et al. 2016)."""

    paths: np.ndarray
    size: int
    workers: int = min(8, os.cpu_count() or 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.size, self.size

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None, channels_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Images.batches`; the images do not depend on the number of worker processes."""
        if generator is None:
            draws = [(i, None) for i in range(len(self))]
        else:
            kept = min(len(self), self.steps(batch_size) * batch_size)
            order = torch.randperm(len(self), generator=generator)[:kept]
            seeds = torch.randint(2**62, (kept,), generator=generator)
            draws = list(zip(order.tolist(), seeds.tolist(), strict=True))
        loader = torch.utils.data.DataLoader(
            _Decoder(self.paths, self.size),
            batch_size,
            sampler=draws,
            num_workers=self.workers,
            pin_memory=self.labels.is_cuda,
            generator=torch.Generator(),
        )
        device = self.labels.device
        for index, images in loader:
            images = images.to(device, non_blocking=True)
            yield self._normalise(images, channels_last), self.labels[index.to(device)]


class _Decoder:
    """Decodes the image asked for as (index, seed of its random crop or None for its centre)."""

    def __init__(self, paths: np.ndarray, size: int):
        self.paths = paths
        import_torchvision()
        from torchvision import transforms as T

        self.centre = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.PILToTensor()])
        self.random = T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.PILToTensor()])

    def __getitem__(self, item: tuple[int, int | None]) -> tuple[int, Tensor]:
        index, seed = item
        image = open_image(self.paths[index]).convert("RGB")
        if seed is None:
            return index, self.centre(image)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return index, self.random(image)


@dataclass(eq=False)
class Data:
    """A data set: `train` for fitting, `validation` (empty where none was asked for) for choosing, `test` for
    the one number reported in the end."""

    name: str
    num_classes: int
    train: Images | ImageFiles
    validation: Images | ImageFiles
    test: Images | ImageFiles

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.train.shape

    def to(self, device: torch.device | str) -> Data:
        parts = {part: getattr(self, part).to(device) for part in ("train", "validation", "test")}
        return dataclasses.replace(self, **parts)


def load(
    name: str,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    validation: float = 0.1,
    seed: int = 0,
    limit: int | None = None,
    download: bool = False,
    split: str = "stratified",
    crop_padding: str = "zero",
    kept: Kept | None = None,
) -> Data:
    """The data set called `name`, read from `data_dir`.

    `image_size`: pixels of the (square) images, by default their own (`digits`: 16; `imagenet`: 224).
    `validation`: share of the training images that is set aside: of every class, chosen by `seed`, or with a `split` of
    "last" the last ones in the data's order, as ITOP and the authors' code of EAST have it (of every class where they
    lie class by class).
    `crop_padding`: what random crops find beyond an image's edge, "zero" or "reflect".
    `limit`: keep only so many training images, validation included.
    `download`: get the files first, where torchvision can.
    `kept`: what was read by the calls before; takes up what is read here in its place, for runs one after another.

    Raises `UnknownNameError`, `UsageError` where files or values are not as they should be.
    """
    source = source_of(name, download)
    _check(name, source, data_dir, image_size, validation, limit, download)
    if download and not source.table:
        getattr(import_torchvision().datasets, source.torchvision)(data_dir, download=True)
    key = name, str(data_dir), image_size
    train, test = (kept or {}).get(key) or source.read(data_dir and Path(data_dir), image_size)
    if kept is not None:
        kept.clear()  # one data set is enough: many do not fit
        kept[key] = train, test
    num_classes = int(train[1].max()) + 1
    if limit is not None:
        train = _some(train, limit)
    parts = stratified(train[1], validation, seed) if split == "stratified" else _last(train[1], validation)
    kept, held_out = (_take(train, index) for index in parts)
    if len(kept[1]) < 2:
        raise UsageError(f"`data` {name}: {len(kept[1])} images are left for training, needed are at least 2")
    if isinstance(train[0], Tensor):
        return Data(name, num_classes, *_in_memory(kept, held_out, test, source, crop_padding))
    return Data(name, num_classes, *_on_disk(kept, held_out, test, image_size or 224))


def sample(images: Images | ImageFiles, count: int) -> Images | ImageFiles:
    """`count` of the images at random, the same ones at every call; all where there are fewer."""
    content = "images" if isinstance(images, Images) else "paths"
    kept, labels = _some((getattr(images, content), images.labels), count)
    return dataclasses.replace(images, labels=labels, **{content: kept})


def known_shape(name: str) -> tuple[int, int] | None:
    """Channels and pixels of a side of the images of the data set called `name`; None where its files decide.

    Raises `UnknownNameError`.
    """
    return source_of(name).shape


def _check(name, source: Source, data_dir, image_size, validation, limit, download) -> None:
    if not 0 <= validation < 1:
        raise UsageError(f"`validation` {validation}: allowed are shares from 0 to below 1")
    for flag, value in (("`image_size`", image_size), ("`limit`", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: allowed are whole numbers from 1")
    if download and not source.torchvision:
        online = [*(n for n in SOURCES if SOURCES[n].torchvision), "openml:<name>"]
        raise UsageError(f"`download`: allowed for {', '.join(online)}")
    if source.table:
        if image_size is not None:
            raise UsageError(f"`image_size` {image_size}: `data` {name} is a table, which has no pixels")
        return
    if not source.needs and data_dir is not None:
        reading = ", ".join(other for other in SOURCES if SOURCES[other].needs)
        raise UsageError(f"`data_dir` {data_dir} is not read by `data` {name}; `data` that reads a folder: {reading}")
    if source.needs and data_dir is None:
        raise UsageError(f"`data` is {name}, which needs `data_dir`, a folder with {source.needs}")
    if source.needs and not download and not Path(data_dir).is_dir():
        raise UsageError(f"`data_dir` {data_dir}: no such folder; expected is one with {source.needs}")


def _take(part: Labelled, index: Tensor) -> Labelled:
    images, labels = part
    return images[index if isinstance(images, Tensor) else index.numpy()], labels[index]


def _some(part: Labelled, limit: int) -> Labelled:
    order = torch.randperm(len(part[1]), generator=torch.Generator().manual_seed(0))
    return _take(part, order[:limit].sort().values)


def _last(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices of what is kept, and of the last ones, a share of all; of every class where the data lie class by class,
    as in class folders."""
    if bool((labels.diff() >= 0).all()):
        counts = labels.bincount()
        left = counts.cumsum(0).repeat_interleave(counts) - torch.arange(len(labels))  # to the end of the class
        chosen = left <= (share * counts).long().repeat_interleave(counts)
    else:
        chosen = torch.arange(len(labels)) >= len(labels) - int(share * len(labels))
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _in_memory(
    train: Labelled, validation: Labelled, test: Labelled, source: Source, crop_padding: str
) -> list[Images]:
    mean, std = _of_rows(train[0]) if train[0].is_floating_point() else _statistics(train[0])
    plain = [Images(labels, mean, std, images) for images, labels in (train, validation, test)]
    padding = plain[0].shape[-1] // 8 if source.crop else 0
    augmented = dataclasses.replace(plain[0], padding=padding, flip=source.flip, mode=crop_padding)
    return [augmented, *plain[1:]]


def _on_disk(train: Labelled, validation: Labelled, test: Labelled, size: int) -> list[ImageFiles]:
    """Normalised by the constants customary for ImageNet."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return [ImageFiles(labels, mean, std, paths, size) for paths, labels in (train, validation, test)]


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature, [F, 1, 1]; 1 where it is constant."""
    mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, [C, 1, 1], exact, from a histogram of the 256 values."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])])
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256).double()
    mean = share @ values
    variance = share @ values**2 - mean**2
    return mean.float().view(-1, 1, 1), variance.clamp(min=1).sqrt().float().view(-1, 1, 1)
