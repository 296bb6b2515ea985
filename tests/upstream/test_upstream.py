"""The published scripts themselves, unmodified, each where its variable names a checkout:

    EAST_ITOP, EAST_SPARSE_LEARNING, EAST_GRANET, EAST_DCTPS

Every run is a process of its own with a folder of its own and a few of scikit-learn's digits, in torchvision's layout
of CIFAR-10 and of MNIST. DCTpS draws its seed from Python's `random`, which nothing of its own seeds: a
`sitecustomize` seeds it here. Where plain `python` has to run a script, the same `sitecustomize` supplies the same
switches as `--east-compat`.
"""

import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from east_plugins.plugins.density import Cyclic

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SITE = """
import os, random
if folder := os.environ.get("EAST_TEST_COMPAT"):
    from pathlib import Path
    from east_plugins.upstream import shims
    held = shims.installed(",".join(shims.SHIMS), Path(folder))
    held.__enter__()
random.seed(0)
"""


@dataclass(frozen=True)
class Script:
    """One script: where it is, flags of a small run, whether it has equal blocks, the line of its final test."""

    variable: str
    file: str
    flags: str
    density: float
    tested: str = "Test evaluation: Average loss"
    shares: bool = True
    needs: tuple[str, ...] = ("torchvision",)


DCTPS = "--rigl --prune_method 6 --pruning_factor 0.05 --batch_size 2 --epochs 3 --lr_schedule --milestones 2 "
SCRIPTS = {
    "itop": Script(
        "EAST_ITOP", "main.py",
        "--data mnist --model lenet5 --sparse --density 0.05 --growth gradient --update_frequency 4 --batch-size 6 "
        "--epochs 4 --lr 0.02 --valid_split 0.4 --save best.pt", 0.05, shares=False,
    ),
    "sparse_learning": Script(
        "EAST_SPARSE_LEARNING", "mnist_cifar/main.py",
        "--data cifar --model wrn-28-2 --density 0.05 --batch-size 6 --epochs 4 --max-threads 2 --decay_frequency 30 "
        "--save-model last.pt", 0.05, needs=("torchvision", "matplotlib"),
    ),
    "granet": Script(
        "EAST_GRANET", "CIFAR/main.py",
        "--data cifar10 --model ResNet20 --sparse --method DST --init-density 0.05 --final-density 0.05 "
        "--sparse-init ERK --update-frequency 4 --batch-size 6 --epochs 4 --max-threads 2 --save best.pt", 0.05,
    ),
    "dctps": Script(
        "EAST_DCTPS", "main.py", DCTPS + "--network_name resnet34 --in_planes 4", 0.05, "TEST ACCURACY OF BEST MODEL",
        needs=("torchvision", "tensorboardX", "ignite"),
    ),
    "dct": Script(
        "EAST_DCTPS", "main.py", DCTPS + "--network_name resnet18 --in_planes 4 --offset dct --init zeros", 0.05,
        "TEST ACCURACY OF BEST MODEL", shares=False, needs=("torchvision", "tensorboardX", "ignite"),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", SCRIPTS)
SHARING = pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if script.shares])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with `cifar-10-batches-py` and `MNIST`: 60 images for training, 30 for testing."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    folder = tmp_path_factory.mktemp("data")
    images = (digits.images[:90] * 15.9).astype(np.uint8)
    labels = digits.target[:90].astype(np.uint8)
    parity = labels % 2  # DCTpS crashes where no epoch gets any of its five validation images right
    cifar, mnist = folder / "cifar-10-batches-py", folder / "MNIST" / "raw"
    cifar.mkdir(parents=True)
    mnist.mkdir(parents=True)
    wide = images.repeat(4, 1).repeat(4, 2).reshape(90, 1, -1).repeat(3, 1).reshape(90, -1)
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        part = slice(12 * i, 12 * i + (30 if i == 5 else 12))
        (cifar / name).write_bytes(pickle.dumps({"data": wide[part], "labels": parity[part].tolist()}, protocol=2))
    padded = np.pad(images.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    for name, part in (("train", slice(0, 60)), ("t10k", slice(60, 90))):
        head = struct.pack(">IIII", 0x803, len(labels[part]), 28, 28)
        (mnist / f"{name}-images-idx3-ubyte").write_bytes(head + padded[part].tobytes())
        head = struct.pack(">II", 0x801, len(labels[part]))
        (mnist / f"{name}-labels-idx1-ubyte").write_bytes(head + labels[part].tobytes())
    return folder


class Runner:
    """Runs of one script, launched or plain; `folder` is the working folder of the last one."""

    def __init__(self, name, data, tmp_path):
        self.script, self.data, self.tmp_path, self.runs = SCRIPTS[name], data, tmp_path, 0
        if self.script.variable not in os.environ:
            pytest.skip(f"{self.script.variable} names no checkout")
        for module in self.script.needs:
            if module != "torchvision":  # which may have to be imported without its operators
                pytest.importorskip(module)
        self.path = Path(os.environ[self.script.variable]).resolve() / self.script.file
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(SITE)

    def launched(self, *flags):
        return self._run("-m", "east_plugins", "run", self.path, *self.script.flags.split(), *flags, "--east-compat")

    def plain(self, *flags, path=None):
        path = path or self.path
        return self._run(path, *self.script.flags.split(), *flags, compat=path.parent)

    def _run(self, *arguments, compat=None):
        """Exit code, what the script printed without times, and stderr."""
        self.runs += 1
        self.folder = self.tmp_path / str(self.runs) / "cwd"
        self.folder.mkdir(parents=True)
        (self.folder / "_dataset").symlink_to(self.data)
        (self.folder.parent / "data").symlink_to(self.data)
        before = os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ, "EAST_TEST_COMPAT": str(compat or ""),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.tmp_path / "site"), str(ROOT), before])),
        }  # fmt: skip
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=self.folder, env=environment, text=True,
                              capture_output=True, timeout=900)  # fmt: skip
        out = re.sub(r"Time taken for epoch: \S+", "", done.stdout)
        return done.returncode, out, done.stderr

    def state(self):
        return torch.load(self.folder / "state.pt")


@pytest.fixture
def runner(data, tmp_path, name):
    return Runner(name, data, tmp_path)


# ------------------------------------------------------------------ nothing without flags


@EVERY
def test_without_flags_the_log_is_that_of_plain_python(runner):
    plain, launched = runner.plain(), runner.launched()
    assert plain[0] == 0, plain[2]
    assert launched[:2] == plain[:2]
    assert runner.script.tested in plain[1]


# ------------------------------------------------------------------ the tricks


def check_cycles(said, state, density):
    """The script's own masks held what the schedule says at every update inside the cycles, and the target after."""
    bounds = re.search(r"in cycles between steps (\d+), (\d+), (\d+)", said)
    start, middle, end = map(int, bounds.groups())
    found = re.findall(r"step (\d+): (\d+) active weights, density (\S+)", said)
    updates = [(int(step), int(count), float(share)) for step, count, share in found]
    target = next(n for s, n, _ in updates if s == end)
    inside = [s for s, *_ in updates if s <= end]
    schedule = Cyclic(density, multiplier=10.0, cycles=2, length=middle - start, length_mult=1.0, pattern="triangular",
                      cyclic_frequency=min(b - a for a, b in zip(inside, inside[1:], strict=False)), frequency=None,
                      end=end + 1)  # fmt: skip
    masked = sum(int(mask.sum()) for mask in state["masks"].values())
    room = sum(mask.numel() for mask in state["masks"].values()) + target - masked  # all there is of tied weights
    wanted = {s: min(room, round(target * (schedule.density(s) / density))) for s, *_ in updates}
    assert {s: n for s, n, _ in updates} == wanted
    assert max(n for _, n, _ in updates) > 5 * target
    assert updates[-1][2] == pytest.approx(density, rel=0.05)  # DCTpS's own ERK clips without redistributing
    assert masked == target or "rigl_torch" in said and masked < target  # which keeps layers dense without a mask
    assert re.search(r"step \d+: target density\b.*; checkpoints count", said)


def check_saved_networks(folder, said):
    """No activation is left in what the script saved last; what was saved before is marked, and was not tested."""
    files = [path for kind in ("pt", "pth", "model") for path in folder.parent.glob(f"**/*.{kind}")]
    files = [path for path in files if path.name != "state.pt" and not path.is_symlink()]
    assert files
    for path in files:
        saved = torch.load(path, weights_only=False)
        saved = saved.get("state_dict", saved)
        if "east_unfinished_at_step" in saved:
            assert "the finished network" in said
        else:
            assert not any("east" in key for key in saved)


@EVERY
@pytest.mark.parametrize("flag", ["--east-cyclic", "--east-dyrelu"])
def test_a_trick_alone(runner, flag):
    code, out, said = runner.launched(flag, "--east-state", "state.pt")
    assert code == 0, said
    assert runner.script.tested in out
    if flag == "--east-cyclic":
        check_cycles(said, runner.state(), runner.script.density)
    else:
        assert "activations, phased out between" in said
    check_saved_networks(runner.folder, said)


@SHARING
def test_sharing_alone(runner):
    code, out, said = runner.launched("--east-share", "--east-state", "state.pt")
    assert code == 0, said
    borrowed = int(re.search(r"([\d,]+) weights shared", said)[1].replace(",", ""))
    masks = runner.state()["masks"].values()
    size = borrowed + sum(mask.numel() for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) / size == pytest.approx(runner.script.density, rel=0.1)
    assert runner.script.tested in out
    check_saved_networks(runner.folder, said)


@pytest.mark.parametrize(("name", "reason"), [("itop", "needs a stage with a block equal"), ("dct", "DCT matrices")])
def test_sharing_is_refused_with_the_reason(runner, reason):
    code, out, said = runner.launched("--east-share")
    said = [line for line in said.splitlines() if line.startswith("east_plugins: ") and "--east-compat" not in line]
    assert code == 2 and len(said) == 1 and "--east-share" in said[0] and reason in said[0]
    assert "Epoch" not in out


@EVERY
@pytest.mark.parametrize("host", ["script", "own"])
def test_all_together(runner, host):
    flags = ["--east"] if runner.script.shares else ["--east-cyclic", "--east-dyrelu"]
    code, out, said = runner.launched(*flags, "--east-host", host, "--east-state", "state.pt")
    assert code == 0, said
    assert "phased out between" in said and runner.script.tested in out
    if host == "script":
        check_cycles(said, runner.state(), runner.script.density)
    check_saved_networks(runner.folder, said)


# ------------------------------------------------------------------ patched


@EVERY
def test_patched_and_launched_runs_give_the_same_masks(runner, tmp_path, capsys):
    from east_plugins.__main__ import main

    checkout = Path(os.environ[runner.script.variable])
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.png", "*.pdf"))
    untouched = {path: path.read_bytes() for path in copy.rglob("*.py")}
    assert main(["patch", str(copy)]) == 0
    changed = [path for path, content in untouched.items() if path.read_bytes() != content]
    assert copy / runner.script.file in changed
    flags = ["--east" if runner.script.shares else "--east-cyclic", "--east-state", "state.pt"]
    code, out, said = runner.plain(*flags, path=copy / runner.script.file)
    assert code == 0, said
    patched = runner.state()
    launched_code, launched_out, launched_said = runner.launched(*flags)
    assert launched_code == 0, launched_said
    launched = runner.state()
    for kind in ("masks", "fired_masks"):
        assert patched[kind].keys() == launched[kind].keys()
        assert all(torch.equal(mask, launched[kind][name]) for name, mask in patched[kind].items())
    assert out == launched_out
    code, out, said = runner.plain("--east-cyclic-length", "1", path=copy / runner.script.file)
    assert code == 2 and "east_plugins: --east-cyclic-length needs --east-cyclic" in said
    assert main(["patch", str(copy), "--reverse"]) == 0
    assert {path: path.read_bytes() for path in untouched} == untouched
