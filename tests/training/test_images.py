import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from east_plugins.errors import UnknownNameError, UsageError
from east_plugins.ops.vision import import_torchvision
from east_plugins.training import images as data
from east_plugins.training.datasets import stratified
from east_plugins.training.images import Images


def images(count=10, channels=3, size=8, **options):
    """Random images without black, labelled by their number."""
    pixels = torch.randint(1, 256, (count, channels, size, size), dtype=torch.uint8)
    options = dict(mean=torch.zeros(channels, 1, 1), std=torch.ones(channels, 1, 1)) | options
    return Images(labels=torch.arange(count), images=pixels, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gather(batches):
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def write_folders(root, splits, size=(8, 8), mode="RGB", suffix="png"):
    """{'train': {'cat': 3, ...}, ...}: so many random images a class. Returns the pixels by path."""
    rng, pixels = np.random.default_rng(0), {}
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                pixels[split, name, i] = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels[split, name, i]).save(folder / f"{i}.{suffix}")
    return pixels


# Batches


def test_batches_without_a_generator_are_all_images_in_order_normalised():
    source = images(10, mean=torch.full((3, 1, 1), 50.0), std=torch.full((3, 1, 1), 4.0), padding=2, flip=True)
    x, y = gather(source.batches(4))
    assert torch.equal(x, (source.images.float() - 50) / 4)
    assert y.tolist() == list(range(10))
    assert list(images(0).batches(4)) == []


def test_training_batches_repeat_with_the_generators_state_and_change_with_it():
    source, generator = images(30, padding=2, flip=True), seeded()
    first, second = gather(source.batches(8, generator)), gather(source.batches(8, generator))
    again = gather(source.batches(8, seeded()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], second[1])
    assert sorted(first[1].tolist()) == list(range(30))


def test_augmented_batches_leave_the_global_random_state_alone():
    source, before = images(20, padding=1, flip=True), torch.get_rng_state()
    gather(source.batches(8, seeded()))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_image_is_a_crop_of_its_zero_padded_self_and_each_has_its_own():
    source = images(200, 2, 6, padding=2, flip=True)
    seen = set()
    for x, label in zip(*gather(source.batches(64, seeded())), strict=True):
        padded = torch.nn.functional.pad(source.images[label].float(), [2] * 4)
        crops = {
            (top, left, mirror): torch.equal(x, crop.flip(-1) if mirror else crop)
            for top in range(5)
            for left in range(5)
            for mirror in (False, True)
            for crop in [padded[:, top : top + 6, left : left + 6]]
        }
        assert sum(crops.values()) == 1
        seen.add(next(key for key, same in crops.items() if same))
    assert len(seen) >= 45  # of 50 that are possible


def test_nothing_is_augmented_unless_asked_for():
    source = images(20)
    for x, y in source.batches(5, seeded()):
        assert torch.equal(x, source.images[y].float())


@given(count=st.integers(2, 60), batch_size=st.integers(2, 20))
def test_no_training_batch_has_a_single_image(count, batch_size):
    sizes = [len(y) for _, y in images(count, 1, 2).batches(batch_size, seeded())]
    assert len(sizes) == images(count, 1, 2).steps(batch_size)
    assert min(sizes) >= 2
    assert sum(sizes) == count - (count % batch_size == 1)


def test_channels_last():
    for generator in (None, seeded()):
        x, _ = next(images(8).batches(4, generator, channels_last=True))
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_batches_come_on_the_device_of_the_set():
    x, y = next(images(8, padding=1).to("meta").batches(4))
    assert x.device.type == y.device.type == "meta"


# Splits


@given(counts=st.lists(st.integers(2, 40), min_size=1, max_size=6), share=st.floats(0.01, 0.5), seed=st.integers(0, 99))
def test_split_takes_the_share_of_every_class_and_loses_nothing(counts, share, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=seeded(seed))]
    rest, chosen = stratified(labels, share, seed)
    assert sorted(rest.tolist() + chosen.tolist()) == list(range(len(labels)))
    wanted = [max(1, round(torch.tensor(share * count).item())) for count in counts]
    assert all(abs(got - want) <= 1 for got, want in zip(labels[chosen].bincount().tolist(), wanted, strict=True))
    assert torch.equal(chosen, stratified(labels, share, seed)[1])


def test_no_validation_images_where_none_are_wanted():
    rest, chosen = stratified(torch.tensor([0, 1, 0]), 0, 0)
    assert rest.tolist() == [0, 1, 2]
    assert len(chosen) == 0


def test_digits():
    pytest.importorskip("sklearn")
    digits = data.load("digits")
    assert digits.input_shape == (1, 16, 16)
    assert digits.num_classes == 10
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    assert abs(len(digits.validation) / (len(digits.train) + len(digits.validation)) - 0.1) < 0.01
    assert not digits.train.flip and digits.train.padding == 0
    other = data.load("digits", seed=1, validation=0.2, image_size=8)
    assert other.input_shape == (1, 8, 8)
    assert torch.equal(other.test.labels, digits.test.labels)  # the test set depends on no option
    x, _ = gather(digits.train.batches(500))
    assert x.mean().abs() < 1e-4
    assert abs(x.std() - 1) < 1e-3


def test_validation_images_change_with_the_seed():
    pytest.importorskip("sklearn")
    a, b = (data.load("digits", seed=seed).validation.images for seed in (0, 1))
    assert a.shape == b.shape
    assert not torch.equal(a, b)


def test_limit_keeps_so_many_training_images_and_all_of_the_test():
    pytest.importorskip("sklearn")
    digits = data.load("digits", limit=100)
    assert len(digits.train) + len(digits.validation) == 100 and len(digits.test) == 359
    assert digits.num_classes == 10


# Files


def test_a_folder_given_and_not_read_is_refused():
    with pytest.raises(UsageError, match="`data_dir` elsewhere is not read by `data` digits; .*cifar10"):
        data.load("digits", "elsewhere")


def test_a_folder_one_too_deep_or_too_high_is_recognised(tmp_path):
    write_folders(tmp_path / "up" / "data", {"train": {"cat": 4, "dog": 3}, "test": {"cat": 1, "dog": 2}})
    for place in ("up/data", "up/data/train", "up"):
        assert len(data.load("folder", tmp_path / place, validation=0).test) == 3
    (tmp_path / "up" / "more").mkdir()
    with pytest.raises(UsageError, match=r"`data_dir` .*up: train is missing there; it holds data, more"):
        data.load("folder", tmp_path / "up")


def test_folder_reads_every_image_with_its_class(tmp_path):
    pixels = write_folders(tmp_path, {"train": {"cat": 4, "dog": 3}, "test": {"cat": 1, "dog": 2}})
    folder = data.load("folder", tmp_path, validation=0)
    expected = [pixels["train", name, i] for name, count in (("cat", 4), ("dog", 3)) for i in range(count)]
    assert np.array_equal(folder.train.images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert folder.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert folder.test.labels.tolist() == [0, 1, 1]
    assert (len(folder.validation), folder.num_classes, folder.train.flip) == (0, 2, True)


def test_the_last_images_of_class_folders_are_those_of_every_class(tmp_path):
    write_folders(tmp_path, {"train": {"cat": 4, "dog": 8}, "test": {"cat": 1, "dog": 1}})
    every = data.load("folder", tmp_path, validation=0)
    split = data.load("folder", tmp_path, validation=0.25, split="last")
    assert split.validation.labels.tolist() == [0, 1, 1] and split.train.labels.tolist() == [0] * 3 + [1] * 6
    assert torch.equal(split.validation.images, every.train.images[[3, 10, 11]])


def test_folder_is_decoded_once_and_again_when_its_files_change(tmp_path):
    write_folders(tmp_path, {"train": {"cat": 2, "dog": 2}, "test": {"cat": 1}})
    first = data.load("folder", tmp_path, validation=0)
    (cache,) = tmp_path.glob(".east_plugins*.npz")
    written = cache.stat().st_mtime_ns
    assert torch.equal(data.load("folder", tmp_path, validation=0).train.images, first.train.images)
    assert cache.stat().st_mtime_ns == written
    Image.new("RGB", (8, 8), (7, 7, 7)).save(tmp_path / "train" / "cat" / "new.png")
    assert len(data.load("folder", tmp_path, validation=0).train) == 5
    cache.write_bytes(b"not an array")
    assert len(data.load("folder", tmp_path, validation=0).train) == 5


def test_grey_images_have_one_channel(tmp_path):
    write_folders(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1}}, mode="L")
    assert data.load("folder", tmp_path, validation=0).input_shape == (1, 8, 8)


def test_folder_images_of_several_sizes_need_an_image_size(tmp_path):
    write_folders(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1}}, size=(12, 8))
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "b" / "other.png")
    with pytest.raises(UsageError, match=r"`image_size` is needed: .*other.png has 20x20 pixels, others 12x8"):
        data.load("folder", tmp_path)
    assert data.load("folder", tmp_path, image_size=10).input_shape == (3, 10, 10)


def test_large_images_are_decoded_as_needed(tmp_path):
    write_folders(tmp_path, {"train": {"a": 3, "b": 4}, "test": {"a": 2}}, size=(80, 100), suffix="jpg")
    large = data.load("folder", tmp_path, image_size=66, validation=0.3)
    assert large.input_shape == (3, 66, 66)
    assert (len(large.train), len(large.validation), len(large.test)) == (5, 2, 2)
    assert [len(y) for _, y in large.train.batches(2, seeded())] == [2, 2]
    epochs = []
    for workers in (0, 1):
        large.train.workers = workers
        before = torch.get_rng_state()
        epochs.append(gather(large.train.batches(3, seeded(5))))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(epochs[0][0], epochs[1][0])  # crops do not depend on the worker processes
    assert epochs[0][0].dtype == torch.float32
    large.test.workers = 0
    x, y = gather(large.test.batches(5))
    assert x.shape == (2, 3, 66, 66)
    assert y.tolist() == [0, 0]


def write_cifar(root, classes=10):
    """CIFAR in torchvision's layout with images of our own, so that no checksum fits."""
    rng, files = np.random.default_rng(0), {}
    folder, key, names = {
        10: ("cifar-10-batches-py", "labels", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]),
        100: ("cifar-100-python", "fine_labels", ["train", "test"]),
    }[classes]
    (root / folder).mkdir()
    for name in names:
        files[name] = rng.integers(0, 256, (classes, 3072), dtype=np.uint8)
        with open(root / folder / name, "wb") as file:
            pickle.dump({"data": files[name], key: list(range(classes))}, file, protocol=2)
    return files


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_with_other_checksums_is_read(tmp_path, classes):
    files = write_cifar(tmp_path, classes)
    cifar = data.load(f"cifar{classes}", tmp_path, validation=0)
    train, test = list(files.values())[:-1], list(files.values())[-1]
    assert np.array_equal(cifar.train.images.numpy(), np.concatenate(train).reshape(-1, 3, 32, 32))
    assert np.array_equal(cifar.test.images.numpy(), test.reshape(-1, 3, 32, 32))
    assert (cifar.train.padding, cifar.train.flip, cifar.num_classes) == (4, True, classes)


def test_cifar_agrees_with_torchvision(tmp_path, monkeypatch):
    datasets = import_torchvision().datasets
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5=None: True)
    write_cifar(tmp_path)
    names = pickle.dumps({"label_names": list("abcdefghij")})
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(names)
    theirs = datasets.CIFAR10(tmp_path)
    ours = data.load("cifar10", tmp_path, validation=0).train
    assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert ours.labels.tolist() == theirs.targets


def test_a_pickle_that_would_run_code_or_is_damaged_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return print, ("ran",)

    write_cifar(tmp_path)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_1", "wb") as file:
        pickle.dump(Attack(), file)
    with pytest.raises(UsageError, match="print"):
        data.load("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    with pytest.raises(UsageError, match="data_batch_1 is damaged"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("wrong", [
    {"data": np.zeros((10, 3072), np.uint8), "labels": [0] * 9}, {"data": np.zeros((10, 3072), np.uint8)},
    {"data": np.zeros((10, 3000), np.uint8), "labels": [0] * 10}, [1, 2],
], ids=["too few labels", "no labels", "wrong width", "a list"])  # fmt: skip
def test_what_is_no_cifar_batch_is_refused(wrong, tmp_path):
    write_cifar(tmp_path)
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_2", "wb") as file:
        pickle.dump(wrong, file, protocol=2)
    with pytest.raises(UsageError, match="`data_dir`: .*data_batch_2 is no CIFAR batch"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("images, labels", [(16 + 3 * 784 - 1, 8 + 3), (16 + 2 * 784, 8 + 3), (16, 8), (5, 8 + 3)])
def test_truncated_mnist_files_are_refused(images, labels, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(bytes(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes(labels))
    with pytest.raises(UsageError, match="`data_dir`: .*MNIST"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist_layout(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = {}
    for part, count in (("train", 20), ("t10k", 5)):
        pixels[part] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(bytes(16) + pixels[part].tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(bytes(8) + bytes(i % 10 for i in range(count)))
    mnist = data.load(name, tmp_path, validation=0)
    assert np.array_equal(mnist.train.images[:, 0].numpy(), pixels["train"])
    assert mnist.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert mnist.train.flip == (name == "fashionmnist")


def test_tinyimagenet_is_tested_on_its_annotated_images(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    write_folders(root / "train", {"n01": {"images": 3}, "n02": {"images": 3}}, size=(64, 64))
    write_folders(root, {"val": {"images": 2}}, size=(64, 64))
    (root / "val" / "val_annotations.txt").write_text("1.png\tn02\t0\t0\t9\t9\n0.png\tn01\t0\t0\t9\t9\n")
    tiny = data.load("tinyimagenet", tmp_path, validation=0)
    assert tiny.input_shape == (3, 64, 64)
    assert tiny.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert tiny.test.labels.tolist() == [1, 0]


# Wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="cifar10"), "`data` is cifar10, which needs `data_dir`, a folder with cifar-10-batches-py"),
        (dict(name="folder", data_dir="/nowhere"), "`data_dir` /nowhere: no such folder; expected .*train/<class>/"),
        (dict(name="digits", validation=1.0), "`validation` 1.0: allowed are shares from 0 to below 1"),
        (dict(name="digits", validation=float("nan")), "`validation` nan"),
        (dict(name="digits", image_size=0), "`image_size` 0"),
        (dict(name="digits", limit=0), "`limit` 0"),
        (dict(name="digits", limit=1), "0 images are left for training"),
        (dict(name="folder", data_dir=".", download=True), "`download`: allowed for mnist, fashionmnist, cifar10"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_wrong_input_is_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as error:
        data.load(**options)
    assert "\n" not in str(error.value)


def test_unknown_data_set_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean cifar10 or cifar100"):
        data.load("cifar")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("tinyimagenet", "tiny-imagenet-200"),
        ("imagenet", "train"),
        ("folder", "train"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, missing):
    with pytest.raises(UsageError, match=f"`data_dir` {tmp_path}: {missing} is missing"):
        data.load(name, tmp_path)


def test_damaged_and_misplaced_images_are_named(tmp_path):
    write_folders(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1}})
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"a/0.png is no readable image"):
        data.load("folder", tmp_path)
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(UsageError, match="test has a class that the training images lack: c"):
        data.load("folder", tmp_path)
