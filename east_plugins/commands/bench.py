"""The command `bench`: timings as ratios, candidates interleaved in one process."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnknownNameError, UsageError
from ..options import flags
from .parsing import parser, program

if TYPE_CHECKING:
    from ..measure.networks import Subject

DENSITIES = [0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.2]
HELP = {
    "step": "whole training steps: dense, masked as ITOP does it, and with the sparse engine",
    "sweep": "a training step at many densities, beside the limit of its arithmetic",
    "update": "a topology update beside the optimizer's step",
    "inference": "one image and batches: dense, and exported as ONNX and C",
    "gpu": "what concerns a GPU: tests, steps, updates; at most 9 minutes",
    "startup": "importing the package, and quick commands",
}
MASKS = ("connected", "ERK", "random", "trained", "connected-trained")


def main(argv: Sequence[str]) -> int:
    if not argv:
        raise UsageError(f"bench needs a benchmark's name: {', '.join(BENCHMARKS)}")
    if argv[0] in ("-h", "--help"):
        print(f"usage: {program()} bench NAME [flags]   (bench NAME --help lists them)\n")
        print("\n".join(f"  {name:<10} {help}" for name, help in HELP.items()))
        print(f"\nexamples:\n  {program()} bench inference --density 0.0005\n  {program()} bench step --threads 1")
        return 0
    if argv[0] not in BENCHMARKS:
        raise UnknownNameError("benchmark", argv[0], BENCHMARKS)
    return BENCHMARKS[argv[0]](argv[1:])


def step(argv: Sequence[str]) -> int:
    parse = parser(
        "bench step",
        "Whole training steps, dense, masked as ITOP does it, and with our sparse engine (SGD, momentum, weight "
        "decay); then the hosts' step() alone.",
        "bench step --model resnet34 --density 0.0005",
        "bench step --masks trained --itop ../ITOP --threads 1 --json",
    )
    _about_the_network(parse)
    add = parse.add_argument
    add("--batch-size", type=int, default=128, metavar="N", help="images a step (default: 128)")
    _masks(parse, "connected")
    add("--activation", metavar="NAME", help="in place of every ReLU, undiluted, e.g. dyrelu-b (default: ReLU)")
    _about_the_timing(parse, 3)
    add("--sparseprop", type=Path, metavar="DIR", help="checkout of SparseProp, built, to time its layers beside ours")
    args = _parsed(parse, argv)
    from ..measure import published
    from ..measure.step import step

    if args.sparseprop:
        published.sparseprop(args.sparseprop)
    result = step(_subject(args), args.batch_size, args.growth, args.repeats, args.itop, args.sparseprop)
    return _printed(result, args.json)


def sweep(argv: Sequence[str]) -> int:
    parse = parser(
        "bench sweep",
        "A whole training step at many densities: dense under masks, ours, and the arithmetic's own limit.",
        "bench sweep --threads 1 --plot sweep.png",
        "bench sweep --densities 0.001,0.01 --sparseprop ../sparseprop --json",
    )
    _about_the_network(parse, density=False)
    _masks(parse, "ERK")
    add = parse.add_argument
    add("--densities", type=_numbers, default=DENSITIES, metavar="X,X",
        help=f"active shares of the weights (default: {','.join(f'{d:g}' for d in DENSITIES)})")  # fmt: skip
    add("--batch-size", type=int, default=32, metavar="N", help="images a step (default: 32)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds (default: 3)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--sparseprop", type=Path, metavar="DIR", help="checkout of SparseProp, built, to time its layers beside ours")
    add("--plot", type=Path, metavar="FILE", help="time against density as PNG, SVG or PDF")
    add("--relative", action="store_true", help="its times in dense steps: what a busy machine's figures are good for")
    add("--json", action="store_true", help="one JSON object in place of the table")
    parse.set_defaults(device="cpu")
    args = _parsed(parse, argv)
    from ..measure import chart, published
    from ..measure import sweep as measure
    from ..ops import figures

    if args.plot:
        figures.check_path(args.plot, "--plot")
    if args.sparseprop:
        published.sparseprop(args.sparseprop)
    result = measure.sweep(_subject(args), args.densities, args.batch_size, args.repeats, args.sparseprop)
    if args.plot:
        chart.density_chart(result, args.model, args.plot, args.relative)
    print(json.dumps(result) if args.json else measure.as_text(result))
    return 0


def update(argv: Sequence[str]) -> int:
    parse = parser(
        "bench update",
        "A topology update of our host against the dense model's optimizer.step(), from ERK's masks.",
        "bench update --model resnet50",
        "bench update --growth random --itop ../ITOP",
    )
    _about_the_network(parse)
    _about_the_timing(parse, 15)
    args = _parsed(parse, argv)
    from ..measure.update import update

    return _printed(update(_subject(args), args.growth, args.repeats, args.itop), args.json)


def inference(argv: Sequence[str]) -> int:
    parse = parser(
        "bench inference",
        "Inference on the CPU: dense in PyTorch and onnxruntime, sparse as ONNX and C. The network is a run's, or one "
        "drawn for 32 x 32 images with random norms.",
        "bench inference --density 0.0005 --plot inference.png",
        "bench inference runs/digits --batch 1 --threads 1",
    )
    add = parse.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="folder of a finished run: its network, masks as trained")
    drawn = [
        add("--model", default="resnet34", metavar="NAME", help="network (default: resnet34)"),
        add("--classes", type=int, default=10, metavar="N", help="its outputs (default: 10)"),
        add("--density", type=float, default=0.0005, metavar="X", help="active share of the weights (default: 0.0005)"),
        _masks(parse, "connected"),
        add("--dctps", action="store_true", help="DCTpS layers"),
    ]
    add("--seed", type=int, default=0, metavar="N", help="seed of masks and values (default: 0)")
    add("--batch", type=_integers, default=[1, 64], metavar="N,N", help="batch sizes (default: 1,64)")
    add("--repeats", type=int, default=20, metavar="N", help="rounds (default: 20)")
    add("--threads", type=int, default=1, metavar="N", help="CPU threads of PyTorch and onnxruntime (default: 1)")
    add("--plot", type=Path, metavar="FILE", help="bar chart as PNG, SVG or PDF")
    add("--json", action="store_true", help="one JSON object in place of the table")
    args = parse.parse_args(argv)
    given = [action.option_strings[0] for action in drawn if getattr(args, action.dest) != action.default]
    if args.run and given:
        raise UsageError(f"{' '.join(given)}: a RUN is measured as it is, leave them out")
    flags.check_size("repeats", args.repeats, "--repeats")
    flags.check_size("threads", args.threads, "--threads")
    for size in args.batch:
        flags.check_size("batch_size", size, "--batch")
    return _inference(args)


def _inference(args: argparse.Namespace) -> int:
    import torch

    from ..measure import chart
    from ..measure.inference import inference
    from ..measure.networks import for_inference
    from ..ops import figures
    from ..training import runs

    if args.plot:
        figures.check_path(args.plot, "--plot")
    torch.set_num_threads(args.threads)
    if args.run:
        run = runs.load_run(args.run)
        model, masks, shape = run.model, run.masks, run.input_shape
    else:
        subject = _subject(args)
        (model, masks), shape = for_inference(subject), subject.shape
    result = inference(model, masks, shape, args.batch, args.repeats, args.threads, args.seed)
    if args.plot:
        chart.bar_chart(result, f"{args.run or args.model}", args.plot)
    return _printed(result, args.json)


def startup(argv: Sequence[str]) -> int:
    parse = parser(
        "bench startup",
        "What it takes to import the package and to answer quick commands, beside import torch.",
        "bench startup --repeats 3",
        "bench startup --repeats 21 --json",
    )
    parse.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default: 7)")
    parse.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    args = parse.parse_args(argv)
    flags.check_size("repeats", args.repeats, "--repeats")
    from ..measure.startup import startup

    return _printed(startup(args.repeats), args.json)


def gpu(argv: Sequence[str]) -> int:
    parse = parser(
        "bench gpu",
        "What concerns a GPU: the tests (of a checkout), training steps beside dense ones, topology updates; at most "
        "9 minutes, the table last.",
        "bench gpu --out runs/cuda",
        "bench gpu --compiled",
    )
    add = parse.add_argument
    add("--tiny", action="store_true", help="small networks, few tests; also without CUDA")
    only = parse.add_mutually_exclusive_group()
    parse.set_defaults(how="eager")
    for how, what in (("compiled", "all networks by torch.compile"), ("graphed", "each as one CUDA graph")):
        help = f"only training steps, {what}"
        only.add_argument(f"--{how}", action="store_const", const=how, dest="how", help=help)
    add("--itop", type=Path, metavar="DIR", help="checkout of ITOP, to time its host beside ours")
    add("--out", type=Path, default=Path("runs/cuda"), metavar="DIR", help="folder of the results (default: runs/cuda)")
    args = parse.parse_args(argv)
    import torch

    from ..measure import checks
    from ..measure.published import itop_file

    if not args.tiny and not torch.cuda.is_available():
        raise UsageError("this torch sees no CUDA device; allowed without one is --tiny")
    if args.itop:
        itop_file(args.itop)
    if args.how == "graphed" and not torch.cuda.is_available():
        raise UsageError("--graphed: this torch sees no CUDA device, and graphs are CUDA's")
    wanted = checks.Wanted(args.out.resolve(), args.tiny, args.how, args.itop)
    wanted.out.mkdir(parents=True, exist_ok=True)
    print(checks.as_text(checks.run(wanted, lambda line: print(line, file=sys.stderr, flush=True))))
    print(f"\nJSON: {wanted.file}")
    return 0


BENCHMARKS: dict[str, Callable[[Sequence[str]], int]] = {
    "step": step, "sweep": sweep, "update": update, "inference": inference, "gpu": gpu, "startup": startup,
}  # fmt: skip


def _about_the_network(parse: flags.Parser, density: bool = True) -> None:
    add = parse.add_argument
    add("--model", default="resnet34", metavar="NAME", help="network (default: resnet34)")
    add("--classes", type=int, default=100, metavar="N", help="its outputs (default: 100)")
    add("--width", type=int, metavar="N", help="channels of its stem (default: its own)")
    add("--image-size", type=int, default=32, metavar="N", help="pixels of an image's side (default: 32)")
    if density:
        add("--density", type=float, default=0.0005, metavar="X", help="active share of the weights (default: 0.0005)")


def _masks(parse: flags.Parser, default: str) -> argparse.Action:
    return parse.add_argument(
        "--masks",
        default=default,
        choices=MASKS,
        help="drawn connected, or ERK (also called random); trained: 20 updates into a RigL run from ERK's, "
        f"connected-trained: from connected ones (default: {default})",
    )


def _about_the_timing(parse: flags.Parser, repeats: int) -> None:
    add = parse.add_argument
    add("--growth", default="gradient", metavar="NAME", help="growth rule (default: gradient)")
    add("--repeats", type=int, default=repeats, metavar="N", help=f"rounds (default: {repeats})")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (default: cpu)")
    add("--itop", type=Path, metavar="DIR", help="checkout of ITOP, to time its host beside ours")
    add("--json", action="store_true", help="one JSON object in place of the table")


def _parsed(parse: flags.Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The flags, checked; threads and memory are as they say."""
    args = parse.parse_args(argv)
    for name in ("repeats", "threads", "classes", "batch_size", "width", "image_size"):
        flags.check_size(name, getattr(args, name, None), f"--{name.replace('_', '-')}")
    import torch

    from ..ops import memory
    from ..training import runs

    runs.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        memory.keep_freed()  # as in training; for all candidates
    return args


def _subject(args: argparse.Namespace) -> Subject:
    """The network that flags describe."""
    import dataclasses

    from ..measure.networks import Subject

    given = {name: value for name, value in vars(args).items() if name in {f.name for f in dataclasses.fields(Subject)}}
    if given.get("masks") == "random":
        given["masks"] = "ERK"
    return Subject(**given)


def _printed(result: dict[str, Any], as_json: bool) -> int:
    from ..measure import timing

    print(json.dumps(result) if as_json else timing.as_text(result))
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be numbers, as in 0.001,0.01") from None


def _integers(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be whole numbers, as in 1,64") from None
