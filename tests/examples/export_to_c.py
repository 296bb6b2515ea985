"""A sparse network as a C program that classifies an image: export_to_c.py FOLDER."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from east_plugins import Masking
from east_plugins.export import Interface, run_c, to_c, verify
from east_plugins.export.program import image_program
from east_plugins.training.models import build

folder, shape = Path(sys.argv[1]), (1, 8, 8)
model = build("resnet20", num_classes=10, in_channels=1, image_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mask = Masking.of("rigl+connected", model, optimizer, density=0.005, steps=1000, input_shape=shape)
...  # train it

about = Interface(mean=(127.5,), deviation=(64.0,), labels=tuple("0123456789"))
file = to_c(model.eval(), mask.masks, shape, "digits", about)
(folder / "digits.c").write_text(file.text + image_program(file))
print(f"digits.c: static memory {file.arena_bytes} bytes of activations and {file.table_bytes} of tables")
if compiler := shutil.which("cc"):
    verify(run_c(file), model, mask.masks, torch.randn(8, *shape))  # against PyTorch
    subprocess.run([compiler, "-O3", "-DDIGITS_MAIN", "digits.c", "-o", "digits", "-lm"], cwd=folder, check=True)
    image = b"P5 8 8 255\n" + bytes(range(0, 256, 4))
    print(subprocess.run([folder / "digits"], input=image, capture_output=True, check=True).stdout.decode(), end="")
