"""The compiled kernels under GCC's sanitizers, on everything that the kernels' own tests do with them; and that the
sanitizers do see them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = ["test_blocks.py", "test_copies.py", "test_fused.py", "test_lines.py", "test_taps.py"]
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g",
    "thread": "-fsanitize=thread -g",
}
#: In place of libgomp, see threads.c; only where a library is linked.
OWN_THREADS = f'case "$*" in *-shared*) set -- "$@" {HERE / "threads.c"} -fPIC -Wl,-Bsymbolic -lpthread;; esac\n'

#: The compiler is a process without the sanitizer.
ALONE = "import os; del os.environ['LD_PRELOAD']\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs gcc on Linux"),
]


def runtime(sanitizer):
    """The sanitizer's library, which has to be there before any other."""
    path = subprocess.run(
        ["gcc", f"-print-file-name=lib{sanitizer[0]}san.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"gcc has no {sanitizer} sanitizer here")
    return path


def sanitized(sanitizer, folder, script, *args):
    """A Python script, run where the kernels are built with a sanitizer."""
    compiler = folder / "cc"
    own = OWN_THREADS if sanitizer == "thread" else ""
    compiler.write_text(f'#!/bin/sh\n{own}exec gcc "$@" {FLAGS[sanitizer]}\n')
    compiler.chmod(0o755)
    environment = os.environ | {
        "CC": str(compiler),
        "LD_PRELOAD": f"{runtime(sanitizer)}:libstdc++.so.6",  # the latter so that PyTorch can throw
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66 report_signal_unsafe=0",
    }
    alike = ["setarch", "-R"] if shutil.which("setarch") else []  # the thread sanitizer knows some address layouts only
    return subprocess.run(
        [*alike, sys.executable, "-c", ALONE + script, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_kernels_tests_pass_and_nothing_is_found(sanitizer, tmp_path):
    tests = [str(HERE / name) for name in TESTS]
    script = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = sanitized(sanitizer, tmp_path, script, "-q", "-x", "-s", "-p", "no:cacheprovider", *tests)
    said = done.stdout + done.stderr
    found = re.search(r"[^\n]*(ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer)", said)
    assert not found, said[found.start() :][:4000]
    assert done.returncode == 0, said[-4000:]


COPIES = """
import torch
from east_plugins.ops.active import Active
from east_plugins.sparse.copies import CompiledCopies
sets = [Active(torch.ones(64, 64, dtype=torch.bool)) for _ in range(PARTS)]
tensors = [torch.zeros(64, 64)] * PARTS
copies = CompiledCopies(sets)
if BEYOND:
    sets[0].places(tensors[0])[-1] = 64 * 64
copies.write(tensors, torch.ones(64 * 64 * PARTS))
"""


@pytest.mark.parametrize(
    "sanitizer, parts, beyond, said",
    [("address", 1, True, "heap-buffer-overflow"), ("thread", 256, False, "data race")],
)
def test_a_write_out_of_bounds_and_a_race_are_found(sanitizer, parts, beyond, said, tmp_path):
    script = COPIES.replace("PARTS", str(parts)).replace("BEYOND", str(beyond))
    done = sanitized(sanitizer, tmp_path, script)
    assert done.returncode != 0 and said in done.stderr, done.stderr[-4000:]
