"""The line on a terminal that says how far a run is."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from east_plugins.__main__ import main
from east_plugins.training import bar

FLAGS = ("train --method east --model resnet20 --width 8 --density 0.05 --epochs 4 --limit 160 --batch-size 32 "
         "--threads 1 --device cpu --engine dense --loggers none --east-cyclic-update-frequency 2 --out")  # fmt: skip


def on_a_terminal(width, flags, monkeypatch):
    """What a command writes to a terminal so wide, as the lines that stand there one after another."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    written = []

    def read():
        while part := os.read(ours, 65536):
            written.append(part)
            if part.endswith(b"\x04"):
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(flags) == 0
        terminal.write("\x04")
        terminal.flush()
        reader.join()
    os.close(ours)
    return re.split(r"\r\x1b\[K|\r?\n", b"".join(written).decode().removesuffix("\x04"))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_line_has_all_that_counts_and_fits_the_terminal(width, tmp_path, monkeypatch):
    monkeypatch.setattr(bar, "EVERY", 0.0)
    shown = on_a_terminal(width, [*FLAGS.split(), str(tmp_path / "run")], monkeypatch)
    lines = [line for line in shown if re.match(r"(epoch )?\d/4 ", line)]
    assert len(lines) > 15 and all(len(line) < width for line in lines)
    for words in (r"[234]/4 ", r"\d+ s", r"val\w* \d+\.\d%", r"[\d,]+ active", r"\d+% on", r"beta [01]\.\d\d"):
        assert all(re.search(words, line) for line in lines[8:]), words
    if width == 120:
        assert all(re.search(r"DyReLU's beta .*\|█* *\|$", line) for line in lines[8:])


def test_warnings_stand_in_lines_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("east_plugins"), "propagate", False)  # nobody else takes them
    flags = "train --method rigl --model resnet20 --width 8 --density 0.0005 --epochs 2 --limit 160 --threads 1".split()
    lines = on_a_terminal(80, [*flags, "--device", "cpu", "--out", str(tmp_path / "run")], monkeypatch)
    assert any(line.startswith("epoch 1: no active weight lies on a path") for line in lines)
