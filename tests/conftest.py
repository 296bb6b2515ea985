import os
import tempfile

# Tests' networks are tiny, and several test processes with OpenMP teams of their own on the same few cores spin in
# its barriers for minutes. Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first call: deterministic tests need it
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="east-cache-")  # the engine keeps there what it has measured

import pytest
import torch

from east_plugins.commands import waiting


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="slow; run with --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # commands that a test called may have changed it


@pytest.fixture(autouse=True)
def _no_word_of_waiting(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST", 1e6)  # a busy machine is slow, and tests count lines
