"""Tables of numbers as data: where they come from, how they are split, and what they are refused for."""

import json
import types

import pytest
import torch

from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.training import images, models, runs


def written(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(data):
    return {part: getattr(data, part).images[:, :, 0, 0] for part in ("train", "validation", "test")}


def test_the_embedded_table_is_split_by_class_and_normalised_by_the_training_rows():
    data = images.load("table", validation=0.15)
    assert data.input_shape == (30, 1, 1) and data.num_classes == 2
    sizes = [len(getattr(data, part)) for part in ("train", "validation", "test")]
    assert sum(sizes) == 569 and abs(sizes[2] - 0.15 * 569) < 2
    x = torch.cat([x for x, _ in data.train.batches(100)])
    torch.testing.assert_close(x.mean(0), torch.zeros(30, 1, 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(30, 1, 1), atol=1e-3, rtol=0)
    before = data.train.images.clone()
    list(data.train.batches(100)), list(data.train.batches(100, torch.Generator()))
    assert torch.equal(data.train.images, before)  # batches are copies, though no conversion is needed
    shuffled = torch.cat([x for x, _ in data.train.batches(100, torch.Generator().manual_seed(0))])
    torch.testing.assert_close(shuffled[:, 0].sort(0).values, x[:, 0].sort(0).values)


@pytest.mark.parametrize("label, first", [("class", 0), ("Target", 2), ("whatever", 3)])
def test_a_csv_file_has_its_label_in_the_named_column_or_the_last_one(label, first, tmp_path):
    names, values = ["a", "b", "c"], [[i, 10 * i, 7] for i in range(40)]
    at = min(first, 3)
    lines = [",".join([*names[:at], label, *names[at:]])]
    for i, row in enumerate(values):
        text = list(map(str, row))
        lines.append(",".join([*text[:at], ["yes", "no"][i % 2], *text[at:]]))
    data = images.load("table", written(tmp_path / "t.csv", lines), validation=0.0)
    every = torch.cat([data.train.images, data.test.images])[:, :, 0, 0]
    assert data.input_shape == (3, 1, 1) and len(every) == 40
    order = every[:, 0].argsort()
    assert torch.equal(every[order], torch.tensor(values, dtype=torch.float32))
    labels = torch.cat([data.train.labels, data.test.labels])[order]
    assert labels.tolist() == [1, 0] * 20  # no, yes in the order of their names
    assert float(data.train.std[2]) == 1  # a constant column


@pytest.mark.parametrize("lines, message", [
    (["1,2,a", "3,x,b"], "line 2: expected are 2 numbers and a label"),
    (["a,b,class", "1,2,0", "1,0"], "line 3: expected are 2 numbers and a label"),
    (["1,2,a"] * 9, "1 classes in 9 rows"),
    ([f"1,2,{i}" for i in range(9)], "9 classes in 9 rows"),
    (["1,nan,a", "1,2,b"] * 5, "values must be finite"),
    (["alone"], "expected are lines of numbers and a label"),
])  # fmt: skip
def test_tables_that_cannot_be_are_refused_by_line(lines, message, tmp_path):
    with pytest.raises(UsageError, match=f"`data_dir` .*t.csv.*{message}"):
        images.load("table", written(tmp_path / "t.csv", lines))


@pytest.mark.parametrize("words, message", [
    ("--data openml:higgs --data-dir {tmp}", "--data openml:higgs: nothing of it is in"),
    ("--data table --image-size 8", "--data table is a table, which has no pixels"),
    ("--data table --download", "--download: allowed for"),
    ("--data table --data-dir {tmp}/none.csv", "cannot be read as CSV"),
    ("--data tabel", "did you mean table"),
])  # fmt: skip
def test_wrong_flags_are_one_line(words, message, tmp_path, capsys):
    asked = words.format(tmp=tmp_path).split()
    assert main(["train", "--model", "small-mlp", *asked, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_openml_is_asked_by_name_or_number_and_kept_in_the_folder_given(tmp_path, monkeypatch):
    import sklearn.datasets

    asked = []

    def fetch(data_home, **which):
        asked.append((which.get("name"), which.get("data_id"), data_home))
        features = torch.arange(60.0).view(20, 3).numpy()
        return types.SimpleNamespace(data=features, target=["1", "10", "2", "10"] * 5)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    data = images.load("openml:higgs", tmp_path, download=True)
    assert data.num_classes == 3 and data.input_shape == (3, 1, 1)
    (tmp_path / "openml").mkdir()
    images.load("openml:44129", tmp_path)
    assert asked == [("higgs", None, str(tmp_path)), (None, 44129, str(tmp_path))]


def test_a_small_mlp_trains_on_a_table_by_the_binary_cross_entropy(tmp_path):
    flags = "--data table --model small-mlp --method rigl --density 0.2 --epochs 4 --batch-size 32 --update-frequency 5"
    assert main(["train", *flags.split(), *"--device cpu --threads 1 --quiet --out".split(), str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.85 and summary["parameters"] == 30 * 256 + 256 + 256 * 257 + 257
    model = runs.load_run(tmp_path).model
    x, y = torch.randn(5, 30, 1, 1), torch.tensor([0, 1, 1, 0, 1])
    z = torch.nn.Sequential(*list(model)[:-1])(x).squeeze(1)
    torch.testing.assert_close(
        torch.nn.functional.cross_entropy(model(x), y),
        torch.nn.functional.binary_cross_entropy_with_logits(z, y.float()),
    )


@pytest.mark.parametrize("name, settings, parameters", [
    ("small-mlp", dict(num_classes=2, in_channels=24, image_size=1), 72_449),
    ("large-mlp", dict(num_classes=10), 3_676_682),
    ("small-cnn", dict(num_classes=10), 94_538),
    ("resnet56", dict(num_classes=10), 855_770),
])  # fmt: skip
def test_networks_have_the_parameters_of_table_2(name, settings, parameters):
    assert sum(p.numel() for p in models.build(name, **settings).parameters()) == parameters


def test_resnet50_has_the_weights_of_table_2_and_efficientnet_is_torchvisions():
    from east_plugins.ops.maskable import theoretical_size

    with torch.device("meta"):  # the paper counts weights only: no biases, no norms
        assert theoretical_size(models.build("torchvision:resnet50", 1000, image_size=224)) == 25_502_912
        assert type(models.build("efficientnet_b0", 200, image_size=64)).__name__ == "EfficientNet"
