"""What an installed package needs is named in setup.cfg."""

import configparser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def files(section):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config[section]


def test_every_file_of_the_package_that_is_no_module_is_installed():
    data = files("options.package_data")
    packaged = {
        path for package, patterns in data.items() for pattern in patterns.split()
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }  # fmt: skip
    wanted = {
        path for path in (ROOT / "east_plugins").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".md") and "__pycache__" not in path.parts
    }  # fmt: skip
    assert packaged == wanted and any(path.suffix == ".c" for path in wanted)


def test_patches_are_installed():
    installed = {path for pattern in files("options.data_files").values() for path in ROOT.glob(pattern)}
    assert installed == set((ROOT / "patches").glob("*.patch")) != set()
