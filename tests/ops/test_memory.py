"""Freed memory is kept for reuse."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from east_plugins.ops import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16, 2**20).fill_(1)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
assert memory.keep_freed()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_tensors_are_made_from_freed_memory():
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, out.split())
    assert kept <= given_back / 10, "every new tensor cost page faults anew"


def test_other_libraries_are_left_alone(monkeypatch):
    from east_plugins.ops import memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed() is False
