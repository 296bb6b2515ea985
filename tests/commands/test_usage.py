"""What commands say of themselves, and how they end when nobody listens."""

import re
import subprocess
import sys

import pytest

from east_plugins.__main__ import COMMANDS as COMMANDS_THERE
from east_plugins.__main__ import main
from east_plugins.options import flags
from east_plugins.options.config import Config
from east_plugins.plugins import registry

COMMANDS = [
    *(name for name in COMMANDS_THERE if name not in ("run", "bench")),
    *(f"bench {what}" for what in ("step", "sweep", "update", "inference", "gpu", "startup")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_command_as_it_was_called_and_ends_with_two_examples(command, capsys, monkeypatch):
    for called, name in (("/usr/bin/east", "east"), ("__main__.py", "python -m east_plugins")):
        monkeypatch.setattr(sys, "argv", [called])
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        said = capsys.readouterr().out
        assert said.startswith(f"usage: {name} {command} ")
        examples = said[said.index("examples:") :].splitlines()[1:]
        assert len(examples) == 2 and all(f"{line} ".startswith(f"  {name} {command} ") for line in examples)


@pytest.mark.parametrize("words", ["--help", "run --help", "bench --help"])
def test_help_without_flags_of_its_own_ends_with_two_examples(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/east"])
    assert main(words.split()) == 0
    said = capsys.readouterr().out
    examples = said[said.index("examples:") :].splitlines()[1:]
    assert len(examples) == 2 and all(line.startswith("  east ") for line in examples)


@pytest.mark.parametrize("command", ["train", "compare", "study", "cycles", "info"])
def test_help_says_on_the_first_screen_what_the_command_does(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/east"])
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, nothing, description = capsys.readouterr().out.splitlines()[:3]
    assert usage == f"usage: east {command}{' --out DIR' * (command != 'info')} [flags]"
    assert nothing == "" and description[0].isupper()


def test_help_has_the_names_of_what_is_built_in():
    parser = flags.Parser()
    flags.add_flags(parser, Config)
    kinds = dict(growth=registry.growth, death=registry.pruning, redistribution=registry.redistribution,
                 structure=registry.structure, sparse_init=registry.allocation, companion=registry.companion,
                 decay_schedule=registry.rate)  # fmt: skip
    for name, kind in kinds.items():
        shown = flags.option_strings(parser)[f"--{name.replace('_', '-')}"].help
        words = set(re.split(r"[ ,:]+", shown.partition("(default:")[0]))
        built_in = {entry.name for entry in kind.entries() if entry.source.startswith("east_plugins.")}
        assert built_in <= words and "(default: " in shown, (name, built_in - words)


def test_info_says_the_defaults_that_it_uses(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"--method NAME .*?\(default: rigl\)", said) and re.search(
        r"--data NAME .*?\(default: cifar10\)", said
    )


@pytest.mark.parametrize("words", ["--help", "bench --help", "bench step --help", "info --model help"])
def test_a_reader_that_has_gone_is_no_error(words):
    with subprocess.Popen(
        [sys.executable, "-m", "east_plugins", *words.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        said = process.stderr.read().splitlines()  # at most that it is at work, on a slow machine
        assert all(line.endswith(b": loading PyTorch") for line in said) and process.wait() == 0


@pytest.mark.parametrize("data, classes", [("digits", 10), ("cifar100", 100), ("imagenet", 1000)])
def test_info_counts_the_classes_of_the_data(data, classes, capsys):
    assert main(["info", *"--model resnet20 --width 4 --image-size 32 --density 0.2 --data".split(), data]) == 0
    assert re.search(rf"fc.weight +{classes}x16 ", capsys.readouterr().out)


def test_info_counts_the_class_folders(tmp_path, capsys):
    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
    flags = "--model resnet20 --width 4 --image-size 32 --density 0.2 --data folder --data-dir".split()
    assert main(["info", *flags, str(tmp_path)]) == 0
    assert re.search(r"fc.weight +3x16 ", capsys.readouterr().out)


def test_bench_tables_have_one_unit_a_column(capsys):
    assert main("bench update --model cnn --density 0.1 --repeats 1 --threads 1".split()) == 0
    times, ratios = capsys.readouterr().out.strip().split("\n\n")
    assert times.startswith("ms, 1 thread ") and ratios.startswith("ratio of medians")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
def test_memory_that_runs_out_is_one_line(tmp_path):
    code = f"""
import resource, sys, torch
from east_plugins.__main__ import main
import east_plugins.training.trainer
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
words = "train --method set --model resnet34 --width 256 --threads 1 --epochs 1 --out".split()
sys.exit(main([*words, {str(tmp_path / "run")!r}]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    assert (
        ended.stderr.splitlines()[-1].startswith("east_plugins: not enough memory: ")
        and "Traceback" not in ended.stderr
    )
