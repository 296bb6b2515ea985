import os
import stat

import pytest
import torch

from east_plugins.ops.files import digest, replacing, save_checkpoint, write_atomically


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "table.md"
    write_atomically(path, "first")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as unfinished:
        unfinished.write_text("sec")
        raise RuntimeError("half way")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["table.md"]


def test_what_cannot_be_saved_leaves_no_part_behind(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"function": lambda: None})
    assert not os.listdir(tmp_path)


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("1")
    path.chmod(0o750)
    write_atomically(path, b"2")
    assert path.read_bytes() == b"2" and stat.S_IMODE(path.stat().st_mode) == 0o750


def test_a_writer_that_adds_a_suffix_of_its_own_finds_it_there(tmp_path):
    numpy = pytest.importorskip("numpy")
    with replacing(tmp_path / "cache.npz") as unfinished:
        numpy.savez(unfinished, x=1)
    assert os.listdir(tmp_path) == ["cache.npz"]


def test_the_digest_sees_names_shapes_and_bytes():
    x = torch.arange(4.0)
    found = {digest(t) for t in ({"a": x}, {"b": x}, {"a": x.view(2, 2)}, {"a": -x}, {"a": x.double()})}
    assert len(found) == 5 and digest({"a": x, "b": x}) == digest({"b": x.clone(), "a": x.clone()})
