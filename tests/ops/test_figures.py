"""Styles that can be told apart, and files that are there whole or not at all."""

import sys

import pytest

from east_plugins.errors import MissingExtraError, UsageError
from east_plugins.ops import figures


@pytest.mark.parametrize("style", [figures.filled, figures.drawn])
def test_no_two_of_49_series_look_the_same(style):
    looks = [tuple(sorted(style(number).items())) for number in range(49)]
    assert len(set(looks)) == 49
    assert all(a != b for a, b in zip(looks, looks[1:], strict=False))


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    picture = figures.figure(1, 1)
    figures.save(picture, tmp_path / "a.png", "--plot")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UsageError, match="--plot .*b.png cannot be written: disk full"):
        figures.save(picture, tmp_path / "b.png", "--plot")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_matplotlib_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        figures.figure(1, 1)
