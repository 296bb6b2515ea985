"""What it takes to start: the package and its quick commands beside `import torch`, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

from .timing import interleaved, report

CANDIDATES = {
    "python": ["-c", ""],
    "import torch": ["-c", "import torch"],
    "import east_plugins": ["-c", "import east_plugins"],
    "--help": ["-m", "east_plugins", "--help"],
    "plugins": ["-m", "east_plugins", "plugins"],
    "wrong flag": ["-m", "east_plugins", "train", "--nonsense"],
    "bench step --help": ["-m", "east_plugins", "bench", "step", "--help"],
}


def startup(repeats: int = 7) -> dict[str, Any]:
    """Milliseconds from a process's start to its end, files being in memory after the first round; and each as a
    multiple of `import torch`."""
    runs = {name: partial(_run, words) for name, words in CANDIDATES.items()}
    ratios = {f"{name} over import torch": (name, "import torch") for name in CANDIDATES if name != "import torch"}
    return report(interleaved(runs, repeats), ratios)


def _run(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
