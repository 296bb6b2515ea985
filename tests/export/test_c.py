import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from east_plugins import UsageError, export
from east_plugins.ops.maskable import maskable
from east_plugins.training import models

COMPILERS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason="not installed"))
    for name in ("gcc", "clang")
]

WARNINGS = "-Wall -Wextra -Werror"

PROGRAM = """
#include "network.c"
#include <stdio.h>

int main(void)
{
    static float input[INPUTS], output[OUTPUTS];
    while (fread(input, sizeof input, 1, stdin) == 1) {
        network_run(input, output);
        fwrite(output, sizeof output, 1, stdout);
    }
    return 0;
}
"""


@pytest.fixture
def network(randomise):
    model = models.build("resnet20", 10, width=8).eval()
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    return model, {name: torch.rand(w.shape, generator=generator) < 0.1 for name, w in maskable(model).items()}


def run_program(compiler, flags, file, x, folder):
    """Outputs of a program that includes the C file, for a batch of inputs."""
    (folder / "network.c").write_text(file.text)
    (folder / "main.c").write_text(PROGRAM)
    sizes = [f"-DINPUTS={x[0].numel()}", f"-DOUTPUTS={np.prod(file.output_shape, dtype=int)}"]
    subprocess.run([compiler, *flags, *sizes, folder / "main.c", "-o", folder / "main", "-lm"], check=True)
    done = subprocess.run([folder / "main"], input=x.numpy().tobytes(), capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(len(x), *file.output_shape)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("flags", ["-O3", f"-std=c99 -pedantic {WARNINGS}", f"-std=c99 -O3 -march=native {WARNINGS}"])
def test_compiles_without_a_warning_and_agrees(network, compiler, flags, tmp_path):
    model, masks = network
    file = export.to_c(model, masks, (3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    export.verify(lambda inputs: run_program(compiler, flags.split(), file, x, tmp_path), model, masks, x)


SANITIZED = "-std=c99 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all".split()


@pytest.mark.parametrize("compiler", COMPILERS)
def test_sanitizers_find_nothing(network, compiler, tmp_path):
    model, masks = network
    file = export.to_c(model, masks, (3, 32, 32))
    run_program(compiler, SANITIZED, file, torch.randn(2, 3, 32, 32), tmp_path)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_sanitizers_find_nothing_in_random_networks(draw_network, data, tmp_path):
    model, masks, shape = draw_network(data.draw)
    run_program("cc", SANITIZED, export.to_c(model, masks, shape), torch.randn(2, *shape), tmp_path)


def test_says_what_memory_it_needs(network, tmp_path):
    file = export.to_c(*network, (3, 32, 32))
    (tmp_path / "network.c").write_text(file.text)
    subprocess.run(["cc", "-c", tmp_path / "network.c", "-o", tmp_path / "network.o"], check=True)
    symbols = subprocess.run(["nm", "-S", tmp_path / "network.o"], capture_output=True, text=True).stdout
    sizes = {line.split()[-1]: int(line.split()[1], 16) for line in symbols.splitlines() if len(line.split()) == 4}
    assert sizes["arena"] == file.arena_bytes
    assert sizes["integers"] + sizes["floats"] == file.table_bytes
    assert f"{file.arena_bytes / 1024:.1f} KiB of activations" in file.text


def test_only_one_function_is_visible(network, tmp_path):
    file = export.to_c(*network, (3, 32, 32), "tiny")
    (tmp_path / "tiny.c").write_text(file.text)
    subprocess.run(["cc", "-c", tmp_path / "tiny.c", "-o", tmp_path / "tiny.o"], check=True)
    symbols = subprocess.run(["nm", "-g", "--defined-only", tmp_path / "tiny.o"], capture_output=True, text=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["tiny_run"]


def test_a_channel_nobody_reads_takes_no_memory():
    model = nn.Sequential(nn.Conv2d(1, 50, 3, padding=1), nn.ReLU(), nn.Conv2d(50, 1, 1)).eval()
    mask = torch.zeros(1, 50, 1, 1, dtype=torch.bool)
    mask[0, 7] = True
    dense, sparse = (export.to_c(model, masks, (1, 8, 8)).arena_bytes for masks in ({}, {"2.weight": mask}))
    assert sparse < dense / 10


def test_inputs_of_another_shape_are_refused(network):
    run = export.run_c(export.to_c(*network, (3, 32, 32)))
    with pytest.raises(UsageError, match=r"\(3, 32, 32\), got \(3, 16, 16\)"):
        run(np.zeros((1, 3, 16, 16), np.float32))


@pytest.mark.parametrize("name", ["my-net", "3d", "", "nät", "a b"])
def test_a_name_that_c_does_not_allow_is_refused(network, name):
    with pytest.raises(UsageError, match="`name`"):
        export.to_c(*network, (3, 32, 32), name)


def test_a_dense_network_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3000, 2000)).eval()
    with pytest.raises(UsageError, match="6,000,000 active weights, most in 1, are too many"):
        export.to_c(model, {}, (3000,))


class Unsupported(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.gate = nn.Softplus()

    def forward(self, x):
        return self.gate(self.first(x))


class Cumulated(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_an_unsupported_layer_is_named():
    with pytest.raises(UsageError, match=r"^gate: export does not support softplus; it does .*convolution") as error:
        export.to_c(Unsupported(), {}, (3, 8, 8))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="cumsum"):
        export.to_onnx(Cumulated(), {}, (4,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_diverged_is_refused(value):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    model[1].running_mean[0] = value
    for write in (export.to_c, export.to_onnx):
        with pytest.raises(UsageError, match="^1: export does not support weights that are infinite or no number"):
            write(model, {}, (2,))


def test_control_flow_on_activations_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UsageError, match="Branching: export does not support"):
        export.to_c(Branching(), {}, (3,))
