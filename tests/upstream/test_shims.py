"""`--east-compat`: each switch supplies what it says, says so when it is used, and is gone afterwards."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from east_plugins import __main__ as command_line
from east_plugins.upstream import shims


@pytest.fixture(autouse=True)
def _anew(elsewhere, monkeypatch):
    """Each switch tells of its use anew."""
    monkeypatch.setattr(shims, "_told", set())


def run(capsys, lines, *arguments, script="s.py"):
    """Exit code, what a script of these lines printed, and what the launcher said."""
    Path(script).parent.mkdir(exist_ok=True, parents=True)
    Path(script).write_text(lines)
    code = command_line.main(["run", script, *arguments])
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def _without_what_other_packages_put_back(monkeypatch):
    """Some trainers and loggers bring `numpy.Inf` back."""
    for name in ("Inf", "product", "in1d"):
        monkeypatch.delattr(np, name, raising=False)


def test_removed_numpy_names(capsys):
    lines = "import numpy as np; print(np.product([2, 3]), np.float is float, np.Inf, np.in1d([1, 5], [5]))"
    code, out, said = run(capsys, lines, "--east-compat=numpy")
    assert (code, out) == (0, "6 True inf [False  True]\n")
    assert said.splitlines() == [
        f"east_plugins: --east-compat: numpy.{name}"
        for name in ("product is numpy.prod", "float is float", "Inf is numpy.inf", "in1d is numpy.isin")
    ]
    with pytest.raises(AttributeError):
        np.product  # noqa: B018


def test_a_name_that_numpy_never_had_is_still_missing(capsys):
    with pytest.raises(AttributeError, match="no attribute 'prodcut'"):
        run(capsys, "import numpy as np; np.prodcut", "--east-compat=numpy")


def test_removed_torch_module(capsys):
    lines = "from torch._six import inf, string_classes; print(inf, isinstance('a', string_classes))"
    code, out, said = run(capsys, lines, "--east-compat=torch")
    assert (code, out) == (0, "inf True\n") and "torch._six.inf" in said
    with pytest.raises(ImportError):
        import torch._six  # noqa: F401


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_stays_on_the_cpu(capsys):
    lines = "import torch; print(torch.ones(2).cuda(0).device, torch.nn.Linear(1, 1).cuda().weight.device)"
    code, out, said = run(capsys, lines, "--east-compat=cuda")
    assert (code, out) == (0, "cpu cpu\n") and said.count(".cuda() stays on the CPU") == 1
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2).cuda()


def test_a_local_package_named_code(capsys, tmp_path):
    import code as standard

    package = tmp_path / "deep" / "code"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "prune.py").write_text("answer = 42")
    given = "from code.prune import answer; print(answer)", "--east-compat=code"
    code, out, said = run(capsys, *given, script="deep/s.py")
    assert (code, out) == (0, "42\n") and "`code` is the package in" in said
    assert sys.modules["code"] is standard and "code.prune" not in sys.modules


def test_loading_of_whole_objects_from_own_folders_only(capsys, tmp_path_factory):
    save = "import torch; torch.save({'model': torch.nn.Linear(1, 1)}, 'm.pt'); "
    load = "print(type(torch.load('m.pt')['model']).__name__)"
    code, out, said = run(capsys, save + load, "--east-compat=load")
    assert (code, out) == (0, "Linear\n") and "torch.load(weights_only=False)" in said
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "m.pt"
    elsewhere.write_bytes(Path("m.pt").read_bytes())
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run(capsys, f"import torch; torch.load({str(elsewhere)!r})", "--east-compat=load")


def test_packages_in_the_root_of_a_checkout(capsys, tmp_path):
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "__init__.py").write_text("answer = 42")
    given = "import beside; print(beside.answer)", "--east-compat=path"
    code, out, said = run(capsys, *given, script="deep/er/s.py")
    assert (code, out) == (0, "42\n") and f"`beside` is the one in {tmp_path / 'beside'}" in said
    del sys.modules["beside"]
    with pytest.raises(ImportError):
        run(capsys, given[0], script="deep/er/s.py")


def test_local_data_that_is_not_the_official_one(capsys):
    from east_plugins.ops.vision import import_torchvision

    import_torchvision()
    lines = (
        "import torchvision.datasets.utils as u, torchvision.datasets.cifar as c\n"
        "open('batch', 'w').write('x')\nprint(c.check_integrity('batch', '0' * 32), c.check_integrity('none', '0'))\n"
    )
    assert run(capsys, lines)[1] == "False False\n"
    code, out, said = run(capsys, lines, "--east-compat=data")
    assert (code, out) == (0, "True False\n") and "whatever their md5 sum" in said
    assert run(capsys, lines)[1] == "False False\n"


@pytest.mark.parametrize(
    ("lines", "switch"),
    [
        ("import numpy as np; np.product([2])", "numpy"),
        ("import numpy as np; np.float", "numpy"),
        ("import numpy as np; np.Inf", "numpy"),
        ("from numpy import product", "numpy"),
        ("from torch._six import inf", "torch"),
        ("raise AssertionError('Torch not compiled with CUDA enabled')", "cuda"),
        ("raise RuntimeError('Found no NVIDIA driver on your system.')", "cuda"),
        ("import code.prune", "code"),
        ("import torch; torch.save(torch.nn.Linear(1, 1), 'm.pt'); torch.load('m.pt')", "load"),
        ("import torchvision; torchvision.datasets.CIFAR10('nowhere')", "data"),
        ("import beside.inner", "path"),
    ],
)
def test_a_script_that_fails_on_age_is_told_the_switch(capsys, tmp_path, lines, switch):
    from east_plugins.ops.vision import import_torchvision

    import_torchvision()
    for package in ("deep/code", "beside"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "beside" / "inner.py").touch()
    (tmp_path / "setup.py").touch()
    with pytest.raises(Exception) as failed:
        run(capsys, lines, script="deep/s.py")
    assert told(failed.value, capsys) == [f"east_plugins: --east-compat={switch} supplies"]
    with pytest.raises(Exception) as failed:  # one of another kind, or with all switches
        run(capsys, "import numpy as np; np.prodcut; " + lines, script="deep/s.py")
    assert told(failed.value, capsys) == []


def told(error, capsys):
    lines = [*getattr(error, "__notes__", ()), *capsys.readouterr().err.splitlines()]
    return [" ".join(line.split()[:3]) for line in lines if "--east-compat=" in line]


def test_a_switch_that_is_given_is_not_advised(capsys):
    with pytest.raises(ZeroDivisionError) as failed:
        run(capsys, "1 / 0")
    assert told(failed.value, capsys) == []
    with pytest.raises(Exception, match="CIFAR|found|corrupted") as failed:
        run(capsys, "import torchvision; torchvision.datasets.CIFAR10('nowhere')", "--east-compat=data")
    assert told(failed.value, capsys) == []


def test_nothing_unless_asked_for(capsys):
    with pytest.raises(AttributeError):
        run(capsys, "import numpy as np; np.product")
    code, out, said = run(capsys, "print(1)", "--east-compat")
    assert (code, out) == (0, "1\n") and "numpy" not in said and "cuda" not in said
