"""What the outputs of a network stand for."""

import pickle

import pytest

from east_plugins.training import classes


@pytest.mark.parametrize("data, count", [("digits", 10), ("cifar100", 100), ("tinyimagenet", 200), ("imagenet", 1000)])
def test_a_data_set_by_name_has_its_own_count(data, count):
    assert classes.count(data) == count


def test_a_folder_has_as_many_classes_as_folders_in_their_order(tmp_path):
    for name in ("owl", "cat", ".hidden"):
        (tmp_path / "train" / name).mkdir(parents=True)
    assert classes.count("folder", tmp_path) == 2 and classes.count("folder") is None
    assert classes.names("folder", tmp_path, 2) == ["cat", "owl"]
    assert classes.names("folder", tmp_path, 3) == ["0", "1", "2"], "the folder is another one by now"


def test_names_are_the_data_sets_own_where_they_are_known(tmp_path):
    assert classes.names("cifar10", None, 10)[3] == "cat" and classes.names("digits", None, 10)[3] == "3"
    assert classes.names("fashionmnist", None, 10)[-1] == "Ankle boot"
    fine = [f"fine{i}" for i in range(100)]
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps({"fine_label_names": fine}))
    assert classes.names("cifar100", tmp_path, 100) == fine
    (tmp_path / "cifar-100-python" / "meta").write_bytes(b"damaged")
    assert classes.names("cifar100", tmp_path, 100)[7] == "7"
