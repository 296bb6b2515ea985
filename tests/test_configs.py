"""Every shipped configuration is one that runs: it resolves for the paper's data, and takes two steps on images of its
shape."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from east_plugins import train
from east_plugins.options import inherit
from east_plugins.training import runs
from east_plugins.training.jobs import jobs

ROOT = Path(__file__).parents[1] / "configs"
COMMON = {"cifar", "dctps", "imagenet"}  #: that others inherit from
STUDIES = ROOT / "studies"  #: for commands of their own, see tests/training/test_study.py
FILES = sorted(path for path in ROOT.rglob("*.yaml") if path.stem not in COMMON and path.parent != STUDIES)
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000, "digits": 10}
STEPS = {"cifar10": 352, "cifar100": 352, "imagenet": 9009, "digits": 21}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def found(path):
    return jobs(None, None, None, Path("out"), {"config": str(path), "threads": 1})


@every_file
def test_every_run_of_a_file_resolves_and_its_network_is_built(path):
    todo = found(path)
    resolved = [job.options.resolve(STEPS[job.options.data]) for job in todo]
    assert len({str(sorted(options.as_dict().items(), key=str)) for options in resolved}) == len(todo)
    first = resolved[0]
    torchvision = first.model.startswith("torchvision:")
    with torch.device("meta") if torchvision else torch.device("cpu"):
        values = {**vars(first), "width": first.width if torchvision else 8, "dctps": first.dctps and not torchvision}
        model = runs.build_model(type(first)(**values), CLASSES[first.data], (3, 32, 32))
    assert any(parameter.dim() == 4 for parameter in model.parameters())


def test_the_rows_of_the_paper_are_all_there():
    names = {path.stem for path in (ROOT / "paper").glob("*.yaml")}
    methods = ("synflow", "set", "rigl", "east", "dctps_rigl", "dctps_east")
    rows = {f"table1_resnet{size}_{method}" for size in (34, 50) for method in methods}
    rows |= {f"table3_{method}" for method in ("synflow", "set", "rigl", "dct", "dct_rigl", "east")}
    rows |= {f"table4_resnet{size}_{method}" for size in (34, 50) for method in ("rigl", "dyrelu", "share")}
    rows |= {f"table6_{method}" for method in ("rigl", "dctps", "dyrelu", "share", "cyclic", "east")}
    rows |= {"b1_east", "b1_dctps_east", "b1_imagenet", "tables_c"}
    assert names == rows | COMMON
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}.yaml`" in readme for name in rows)


def test_a_row_of_table_1_is_eight_cells_of_three_seeds():
    todo = found(ROOT / "paper" / "table1_resnet34_east.yaml")
    assert len(todo) == 24 and {job.options.model for job in todo} == {"resnet34"}
    assert {(job.options.data, job.sparsity) for job in todo} == {
        (data, sparsity) for data in ("cifar10", "cifar100") for sparsity in (0.99, 0.999, 0.9995, 0.9999)
    }


def test_tables_c_are_17_settings_on_four_pairs_with_three_seeds():
    todo = found(ROOT / "paper" / "tables_c.yaml")
    assert len(todo) == 17 * 4 * 3
    for pair in ((model, data) for model in ("resnet34", "resnet50") for data in ("cifar10", "cifar100")):
        assert sum((job.options.model, job.options.data) == pair for job in todo) == 17 * 3


def test_numbers_are_those_of_table_b1():
    east = found(ROOT / "paper" / "b1_east.yaml")[0].options.resolve(352)
    assert (east.batch_size, east.epochs, east.lr, east.lr_drops) == (128, 250, 0.1, [75, 150])
    assert (east.optimizer, east.momentum, east.weight_decay, east.sparse_init) == ("sgd", 0.9, 1e-4, "ERK")
    assert (east.east.cyclic_cycles, east.east.cyclic_length, east.east.cyclic_multiplier) == (2, 50, 10)
    assert (east.east.cyclic_update_frequency, east.update_frequency) == (350, 4000)
    dctps = found(ROOT / "paper" / "b1_dctps_east.yaml")[0].options.resolve(352)
    assert (dctps.epochs, dctps.lr, dctps.lr_drops, dctps.optimizer) == (200, 0.001, [], "adam")
    assert (dctps.weight_decay, dctps.east.cyclic_multiplier, dctps.east.share, dctps.dctps) == (5e-4, 3, False, True)
    assert (dctps.east.cyclic_update_frequency, dctps.update_frequency) == (100, 100)
    imagenet = found(ROOT / "paper" / "b1_imagenet.yaml")[0].options.resolve(9009)
    assert (imagenet.epochs, imagenet.lr_drops, imagenet.update_frequency) == (100, [25, 50], 4000)
    assert (imagenet.east.cyclic, imagenet.east.dyrelu, imagenet.east.share) == (False, True, True)


def test_no_file_says_twice_what_it_inherits():
    for path in FILES:
        *bases, (_, own) = inherit.chain(path)
        inherited = {key: value for _, content in bases for key, value in content.items()}
        method = own.get("method", inherited.get("method")) == inherited.get("method")
        twice = [key for key in own if key in inherited and own[key] == inherited[key] and method]
        assert not twice or twice == ["update-frequency"], (path, twice)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of random images in the layout of each data set."""
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for folder, label, names, classes in (
        ("cifar-10-batches-py", "labels", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 10),
        ("cifar-100-python", "fine_labels", ["train", "test"], 100),
    ):
        (root / folder).mkdir()
        for name in names:
            content = {"data": chance.integers(0, 256, (2 * classes, 3072), np.uint8), label: [*range(classes)] * 2}
            (root / folder / name).write_bytes(pickle.dumps(content, protocol=2))
    for part, count in (("train", 4), ("val", 1)):
        for name in ("a", "b", "c"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 256, (256, 256, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.jpg")
    return root


def two_steps(path, images, out):
    """Two steps of a file's first run, in batches of four images."""
    options = found(path)[0].options
    where = None if options.data == "digits" else str(images)
    rounds = {"sparse_init_rounds": 2} if options.method == "synflow" else {}  # of 100, in double precision each
    short = dataclasses.replace(
        options, data_dir=where, batch_size=4, limit=40, validation=0.25, limit_steps=2, engine="dense",
        plugin_options={**options.plugin_options, **rounds},
    )  # fmt: skip
    return train(short, out, quiet=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_takes_two_steps(path, images, tmp_path):
    assert two_steps(path, images, tmp_path / "run")["unfinished"]
