"""The command `export`."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..export.formats import load_sparse, to_c, to_onnx
from ..export.program import image_program
from ..export.safetensors import to_safetensors
from ..export.verify import Run, run_c, run_onnx, verify
from ..options import flags


def main(argv: Sequence[str]) -> int:
    """Write a run's network as a file, once it agrees with PyTorch on images of the run's test data."""
    from ..training import runs

    args = _parser().parse_args(argv)
    out: Path = args.out
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out} must be a file in a folder that exists")
    if args.check < 1:
        raise UsageError(f"--check must be at least 1, got {args.check}")
    if args.network or args.run.is_file():
        run, test, images_are = *_of_a_script(args.run, args.network, args.check), "random inputs"
    else:
        run = runs.load_run(args.run)
        options = dataclasses.replace(run.config, data_dir=args.data_dir) if args.data_dir else run.config
        test, images_are = runs.load_data(options).test, "test images"
    content, runner, facts = _FORMATS[args.format](run, args.name or out.stem, test)
    images, _ = next(test.batches(args.check))
    difference = verify(runner, run.model, run.masks, images, f"the {args.format} file")
    try:
        runs.write_atomically(out, content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    active = sum(int(mask.sum()) for mask in run.masks.values())
    print(
        f"{out}: {len(content):,} bytes, {active:,} active weights{facts}; largest difference from PyTorch on "
        f"{len(images)} {images_are} {difference:.1e} of the largest output"
    )
    return 0


@dataclasses.dataclass
class _Scripted:
    """What a file of `--east-state` says, in place of a run."""

    model: nn.Module
    masks: dict[str, Tensor]
    input_shape: tuple[int, ...]


@dataclasses.dataclass
class _Drawn:
    """Inputs in place of test images: those of a script are not known here."""

    inputs: Tensor

    @property
    def mean(self) -> Tensor:
        return torch.zeros(self.inputs.shape[1])

    @property
    def std(self) -> Tensor:
        return torch.ones(self.inputs.shape[1])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, None]]:
        yield self.inputs[:batch_size], None


def _of_a_script(path: Path, network: str | None, count: int) -> tuple[_Scripted, _Drawn]:
    from ..upstream import state

    saved = state.read(path)
    if network is None:
        raise UsageError(
            f"{path} is a file of --east-state: --network module:function must make its {saved.network_class}"
        )
    if saved.input_shape is None:
        raise UsageError(f"{path}: the network took something else than one tensor; export needs an input's shape")
    model = saved.network(state.build(network))
    inputs = torch.randn(count, *saved.input_shape, generator=torch.Generator().manual_seed(0))
    return _Scripted(model, saved.masks, saved.input_shape), _Drawn(inputs)


def _parser() -> flags.Parser:
    parser = flags.Parser(prog="east_plugins export", description="A run's sparse network as a deployable file.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a file of --east-state")
    parser.add_argument(
        "--network", metavar="MODULE:FUNCTION", help="for a file of --east-state: what makes its network"
    )
    parser.add_argument("--format", required=True, choices=tuple(_FORMATS), help="kind of file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file that is written")
    parser.add_argument("--name", metavar="NAME", help="c: the function is called NAME_run (default: name of --out)")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the test images (default: the run's)")
    parser.add_argument("--check", type=int, default=64, metavar="N", help="images to check with (default: 64)")
    return parser


def _c(run, name: str, test) -> tuple[bytes, Run, str]:
    file = to_c(run.model, run.masks, run.input_shape, name)
    text = file.text + image_program(file, test.mean, test.std)
    memory = f", static memory {file.arena_bytes:,} bytes of activations and {file.table_bytes:,} of tables"
    return text.encode(), run_c(file), memory


def _onnx(run, name: str, test) -> tuple[bytes, Run, str]:
    content = to_onnx(run.model, run.masks, run.input_shape)
    return content, run_onnx(content), ""


def _safetensors(run, name: str, test) -> tuple[bytes, Run, str]:
    network: dict[str, Any] = {"input_shape": list(run.input_shape)}
    scripted = isinstance(run, _Scripted)
    if not scripted:
        network |= {"config": run.config.as_dict(), "classes": run.summary["classes"]}
    content = to_safetensors(run.model, run.masks, network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        path.write_bytes(content)
        model, _ = load_sparse(path, copy.deepcopy(run.model) if scripted else None)
    return content, lambda inputs: model(torch.from_numpy(inputs)).detach().numpy(), ""


_FORMATS = {"onnx": _onnx, "c": _c, "safetensors": _safetensors}
