"""What a checkpoint holds, read so that nothing in it is run: runs of the trainer, and files of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MissingExtraError, UsageError
from . import files
from .packing import unpack

CHECKPOINT = "checkpoint.pt"  #: the file's name in a run's folder


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A checkpoint's tensors and plain values; raises `UsageError` where it is missing or damaged."""
    try:
        files.check_archive(path)
        state = unpack(torch.load(path, map_location=device, weights_only=True))
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist; expected is the folder of a run") from error
    except Exception as error:  # torch raises whatever the broken bytes lead it to
        raise UsageError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:120]}") from error


def end_of(run: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict and masks at the end of the last saved epoch of a run; raises `UsageError` for another folder."""
    state = load(Path(run) / CHECKPOINT)
    try:
        return state["model"], state["host"]["masks"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{Path(run) / CHECKPOINT} is no checkpoint of a run") from error


def weights(source: str | Path) -> dict[str, Tensor]:
    """The state dict in a run's folder (of its last epoch), in a `.safetensors` file, or in a file of `torch.save`, by
    itself or under `model` or `state_dict`; names as without `DataParallel`. Raises `UsageError`."""
    path = Path(source)
    if path.is_dir():
        return end_of(path)[0]
    if path.suffix == ".safetensors":
        state: Any = _safetensors(path)
    else:
        state = load(path)
        state = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} holds no state dict: expected are names and tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError(f"{path} needs safetensors: pip install 'east_plugins[export]'") from error
    try:
        return load_file(path)
    except Exception as error:  # its own class, or an OSError
        raise UsageError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())[:120]}") from error
