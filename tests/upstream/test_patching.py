"""`patch`: added lines only, for exactly one file of one commit, and out again byte for byte.

The repository keeps no line of the published scripts: what is patched here are files made up around a patch's own
added lines. Patches against the real files are tested in tests/upstream/test_upstream.py.
"""

import dataclasses
import hashlib
import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from east_plugins.__main__ import main
from east_plugins.upstream import patching

FOLDER = Path(__file__).parents[2] / "patches"
PUBLISHED = patching.patches()
ADDED = {"from east_plugins import launch as east\n", "    east.add_flags(parser)\n", "    east.activate(args)\n"}


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of two scripts with a made-up patch for each, Windows line ends and a last line without any."""
    contents = {"main.py": b"import a\r\nparser = b\r\n\targs = c", "deep/main.py": b"x = 1\n\n\ny = 2\n"}
    published = []
    for name, content in contents.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        published.append(
            patching.Patch(
                "https://example.org/some", "0" * 40, name, digest(content), "deep/main.py",
                {1: (b"import east\n",), 2: (b"east.one()\n", b"east.two()\n")},
            )
        )  # fmt: skip
    (tmp_path / "checkout" / "main.py").chmod(0o755)
    monkeypatch.setattr(patching, "patches", lambda: published)
    return tmp_path / "checkout"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments):
    code = main(["patch", *map(str, arguments)])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------ the files in patches/


def test_there_is_a_patch_for_every_published_script():
    assert {(patch.repository.rpartition("/")[2], patch.file) for patch in PUBLISHED} == {
        ("In-Time-Over-Parameterization", "main.py"), ("In-Time-Over-Parameterization", "ImageNet/main.py"),
        ("sparse_learning", "mnist_cifar/main.py"), ("GraNet", "CIFAR/main.py"), ("DCTpS", "main.py"),
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.patch")), ids=lambda path: path.stem)
def test_a_patch_adds_a_handful_of_own_lines_and_shows_none_of_theirs(path):
    patch = patching.read(path)
    lines = [line.decode() for added in patch.added.values() for line in added]
    assert {re.sub(r"^ *", "", line) for line in lines} == {re.sub(r"^ *", "", line) for line in ADDED}
    assert len(lines) == len(ADDED) and [len(added) for added in patch.added.values()] == [1, 1, 1]
    assert re.fullmatch("[0-9a-f]{40}", patch.commit) and re.fullmatch("[0-9a-f]{64}", patch.sha256)
    body = path.read_text().partition("--- a/")[2].splitlines()[2:]
    assert all(line.startswith(("+", "@@ -")) for line in body)
    assert all(re.fullmatch(r"@@ -\d+,0 \+\d+ @@", line) for line in body if line.startswith("@@"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.patch")), ids=lambda path: path.stem)
def test_the_numbers_of_the_new_lines_are_those_of_the_patched_file(path):
    """As `git apply --unidiff-zero` reads them."""
    for shift, (old, new) in enumerate(re.findall(r"@@ -(\d+),0 \+(\d+) @@", path.read_text())):
        assert int(new) == int(old) + 1 + shift


# ------------------------------------------------------------------ applying and taking out


def test_apply_and_reverse_restore_every_byte_and_the_mode(checkout, capsys):
    before = contents(checkout)
    assert main(["patch", str(checkout)]) == 0
    assert capsys.readouterr().out.split() == [
        "patched", str(checkout / "main.py"), "patched", str(checkout / "deep/main.py"),
    ]  # fmt: skip
    assert contents(checkout) == {
        "main.py": b"import a\r\nimport east\nparser = b\r\neast.one()\neast.two()\n\targs = c",
        "deep/main.py": b"x = 1\nimport east\n\neast.one()\neast.two()\n\ny = 2\n",
    }
    assert stat.S_IMODE((checkout / "main.py").stat().st_mode) == 0o755
    assert main(["patch", "--reverse", str(checkout)]) == 0
    assert capsys.readouterr().out.startswith("restored ")
    assert contents(checkout) == before
    assert stat.S_IMODE((checkout / "main.py").stat().st_mode) == 0o755


def test_patched_already_is_refused(checkout, capsys):
    main(["patch", str(checkout)])
    capsys.readouterr()
    patched = contents(checkout)
    assert "main.py is patched already; --reverse" in refused(capsys, checkout)
    assert contents(checkout) == patched


@pytest.mark.parametrize("file", ["main.py", "deep/main.py"])
def test_a_file_that_differs_is_refused_and_none_is_changed(checkout, capsys, file):
    path = checkout / file
    path.write_bytes(path.read_bytes() + b" ")
    before = contents(checkout)
    said = refused(capsys, checkout)
    assert f"{file} is not the file that the patch is for" in said and digest(path.read_bytes())[:12] in said
    assert "at commit 0000000" in said
    assert contents(checkout) == before


def test_reverse_of_what_is_not_patched_is_refused(checkout, capsys):
    before = contents(checkout)
    assert "does not have this patch" in refused(capsys, checkout, "--reverse")
    assert contents(checkout) == before


def test_reverse_beside_other_changes_is_refused(checkout, capsys):
    main(["patch", str(checkout)])
    capsys.readouterr()
    (checkout / "deep/main.py").write_bytes((checkout / "deep/main.py").read_bytes().replace(b"y = 2", b"y = 3"))
    before = contents(checkout)
    assert "deep/main.py does not have this patch, or was changed beside it" in refused(capsys, checkout, "--reverse")
    assert contents(checkout) == before


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    said = refused(capsys, tmp_path)
    assert "no checkout that a patch is for" in said and "VITA-Group/GraNet" in said
    assert "no checkout" in refused(capsys, tmp_path / "missing")
    assert "CHECKOUT" in refused(capsys)


@pytest.mark.parametrize("inside", ["deep", "deep/er"])
def test_a_folder_inside_a_checkout_is_refused(checkout, capsys, monkeypatch, inside):
    """Even where it looks like the root of another repository, as GraNet/CIFAR does."""
    folder = checkout / inside
    folder.mkdir(exist_ok=True)
    (folder / "look.py").write_bytes(b"")
    known = [*patching.patches(), dataclasses.replace(patching.patches()[0], file="look.py", marker="look.py")]
    monkeypatch.setattr(patching, "patches", lambda: known)
    before = contents(checkout)
    assert refused(capsys, folder).endswith(f"lies inside {checkout}; CHECKOUT is the root of the repository")
    monkeypatch.chdir(folder)
    assert "CHECKOUT is the root" in refused(capsys, "--reverse", ".")
    assert contents(checkout) == before


def test_a_repository_inside_another_is_patched(checkout):
    inner = checkout / "inner"
    (inner / "deep").mkdir(parents=True)
    (inner / ".git").touch()
    for name in ("main.py", "deep/main.py"):
        (inner / name).write_bytes((checkout / name).read_bytes())
    assert main(["patch", str(inner)]) == 0


@given(
    lines=st.lists(st.sampled_from([b"a\n", b"b\r\n", b"\n", b"east\n", b"c\r"]), max_size=12),
    last=st.sampled_from([b"", b"end"]),
    where=st.dictionaries(
        st.integers(0, 12), st.lists(st.sampled_from([b"east\n", b"  go\n"]), min_size=1), max_size=4
    ),
)
def test_reverse_undoes_apply(lines, last, where):
    content = b"".join(lines) + last
    whole = len(content.splitlines()) - (not content.endswith((b"\n", b"\r")) and bool(content))
    added = {number: tuple(new) for number, new in where.items() if number <= whole}
    patch = patching.Patch("", "", "", digest(content), "", added)
    patched = patch.apply(content)
    assert patch.reverse(patched) == content
    assert len(patched) == len(content) + sum(len(line) for new in added.values() for line in new)
    if added:
        assert not patch.fits(patched)
    assert dataclasses.replace(patch, added={}).reverse(content) == content
