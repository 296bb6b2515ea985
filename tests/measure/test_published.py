"""Published code from checkouts, timed beside ours."""

import json
import sys

import pytest

from east_plugins.__main__ import main

STEP = "bench step --model cnn --width 4 --image-size 16 --batch-size 4 --density 0.1 --repeats 1 --threads 1".split()
SWEEP = "bench sweep --model cnn --width 4 --image-size 16 --batch-size 4 --repeats 1 --threads 1".split()
FAKE = """
def swap_modules_with_sparse(network, input_shape, inplace=False):
    assert inplace and tuple(input_shape) == (4, 3, 16, 16)
    print("replaced")
    network.SWAPPED = True
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "sparseprop"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "utils.py").write_text(FAKE)
    yield package.parent
    for name in ("sparseprop", "sparseprop.utils"):
        sys.modules.pop(name, None)


def test_sparseprop_is_a_row_beside_ours(checkout, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main([*STEP, "--sparseprop", str(checkout), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)  # nothing that SparseProp prints
    assert "sparseprop" in [row["name"] for row in result["rows"]]
    assert result["ratios"]["sparseprop_over_sparse"] > 0 and result["ratios"]["sparseprop_over_auto"] > 0
    assert str(checkout) not in sys.path


def test_a_checkout_that_is_none_or_not_built_is_refused_in_one_line(checkout, tmp_path, capsys):
    assert main([*STEP, "--sparseprop", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"east_plugins: --sparseprop {tmp_path} is no checkout of SparseProp")
    (checkout / "sparseprop" / "__init__.py").write_text("import no_such_kernels")
    assert main([*SWEEP, "--sparseprop", str(checkout)]) == 2
    said = capsys.readouterr().err
    assert "setup.py build_ext --inplace" in said and said.count("\n") == 1


def test_a_sweep_has_a_row_for_each_density_and_a_picture(tmp_path, capsys):
    flags = ["--densities", "0.05,0.2", "--plot", str(tmp_path / "sweep.png")]
    assert main([*SWEEP, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    low, high = result["rows"]
    assert (low["density"], high["density"]) == (0.05, 0.2) and result["masks"] == "ERK"
    assert low["median_ms"].keys() == high["median_ms"].keys() == {"dense, masked", "ours"}
    assert 0 < low["limit_ms"] < high["limit_ms"]
    assert low["peak_mib"].keys() == low["median_ms"].keys() and min(low["peak_mib"].values()) > 0
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main([*SWEEP, "--densities", "0.1", "--relative", "--plot", str(tmp_path / "relative.svg")]) == 0
    assert "in dense steps" in (tmp_path / "relative.svg").read_text()
    assert "arithmetic alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--densities 0,0.1", "--densities must be in (0, 1], got 0"),
        ("--densities x", "--densities"),
        ("--image-size 0", "--image-size must be at least 4, got 0"),
        ("--masks some", "--masks"),
        ("--plot a.foo", "--plot a.foo must end in one of"),
    ],
)
def test_refusals(flags, said, capsys):
    assert main([*SWEEP, *flags.split()]) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def test_random_is_another_name_of_erk(capsys):
    rows = []
    for masks in ("random", "ERK"):
        assert main([*SWEEP, "--densities", "0.1", "--masks", masks, "--json"]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0]["masks"] == rows[1]["masks"] == "ERK"
    assert rows[0]["rows"][0]["limit_ms"] * rows[0]["gflops"] == pytest.approx(
        rows[1]["rows"][0]["limit_ms"] * rows[1]["gflops"]
    )
