import sys

import pytest

#: Top-level modules of the scripts that these tests launch.
SCRIPTS_OWN = ("sparselearning", "others", "east_test_module", "code", "beside")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The test works in a folder of its own, and leaves no module of a script behind."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in SCRIPTS_OWN:
            del sys.modules[name]
