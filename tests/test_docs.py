"""The READMEs are true as far as a machine can tell: links, files, snippets and commands; and they are easy to read."""

import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from east_plugins.__main__ import COMMANDS
from east_plugins.__main__ import main as command_line
from east_plugins.commands import run
from east_plugins.options import flags, sources

ROOT = Path(__file__).parent.parent
NAMES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "east_plugins/README.md", "east_plugins/sparse/README.md",
    "east_plugins/export/README.md", "east_plugins/trainers/README.md", "patches/README.md", "configs/README.md",
    "configs/studies/README.md",
    "tests/README.md",
]  # fmt: skip
every_document = pytest.mark.parametrize("name", NAMES)

#: Flags in the text that no parser of ours has: of pytest, and of the one command whose parser is its own.
FOREIGN = {"--run-slow", "--reverse"}

#: Modules of ours that need a package which may be missing.
OPTIONAL = {"east_plugins.trainers.lightning": "lightning", "east_plugins.trainers.huggingface": "transformers"}

#: Files of published scripts.
PUBLISHED = {"ImageNet/main.py", "mnist_cifar/main.py", "CIFAR/main.py"}


def text_of(name):
    return (ROOT / name).read_text()


def blocks(name, language=""):
    """Contents of fenced code blocks of a language ("" is a block that names none)."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(name), re.MULTILINE | re.DOTALL)
    return [content for kind, content in fenced if kind == language]


def prose(name):
    return re.sub(r"^```.*?^```$", "", text_of(name), flags=re.MULTILINE | re.DOTALL)


def paragraphs(name):
    """Paragraphs and list items as words that are read; no headings, tables, code blocks and pictures."""
    for block in re.split(r"\n\s*\n", prose(name)):
        for item in re.split(r"\n(?=- )", block.strip()):
            if item and not item.startswith(("#", "|", "![")):
                yield re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(item.split()).removeprefix("- "))


def sentences(paragraph):
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z`*\[\"-])", paragraph) if part]


def inline(name):
    """`code` in the text, joined where it is broken over lines."""
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(name))]


def commands(name):
    """Arguments behind `python -m east_plugins` and `east` of every command shown."""
    lines = [line for block in blocks(name) for line in block.splitlines()] + inline(name)
    for line in lines:
        found = re.match(r"(?:\$ )?(?:python -m east_plugins|east) +(\S.*)", line)
        if found and not found[1].startswith(("COMMAND", "|")):
            yield found[1]


def anchors(path):
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 140


@every_document
def test_sentences_have_25_words_on_average_and_paragraphs_90_at_most(name):
    all_of_them = list(paragraphs(name))
    lengths = [len(sentence.split()) for paragraph in all_of_them for sentence in sentences(paragraph)]
    assert sum(lengths) / len(lengths) <= 25, sorted(lengths)[-5:]
    assert not [paragraph for paragraph in all_of_them if len(paragraph.split()) > 90]


@every_document
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", prose(name)):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            path = folder / file if file else ROOT / name
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@every_document
def test_files_that_are_named_exist(name):
    places = [ROOT, (ROOT / name).parent, ROOT / "east_plugins"]
    for code in inline(name):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/|([\w.-]+/)+[\w-]+\.(py|md|yaml|sh|c|cff|toml)", code):
            theirs = code.startswith(("runs/", "train/", "test/")) or code in PUBLISHED
            assert theirs or any((place / code).exists() for place in places), code


@every_document
def test_python_snippets_compile_and_import_what_there_is(name):
    for snippet in blocks(name, "python"):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("east_plugins"):
                if needed := OPTIONAL.get(node.module):
                    pytest.importorskip(needed)
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


class Parsed(Exception):
    """Raised in place of a command's work, once its flags are read."""


@pytest.fixture
def only_parsed(monkeypatch):
    """The command line up to where flags are read, those of a run checked as well; files lie in the checkout."""
    parse, split = flags.Parser.parse_args, run.split

    def parsed(self, args=None, namespace=None):
        given = parse(self, args, namespace)
        monkeypatch.setattr(flags.Parser, "parse_args", parse)  # the reader of --config is another one
        if "config" in given and "seeds" not in given:
            known = flags.Parser(add_help=False)
            sources.add_flags(known)
            mine = {action.dest for action in flags.option_strings(known).values()}
            run_of_it = {key: v for key, v in vars(given).items() if key in mine or sources.plugged.slot_of(key)}
            sources.from_flags(run_of_it).resolve(352)
        raise Parsed

    def splitted(argv, parser):
        split(argv, parser)
        raise Parsed

    monkeypatch.setattr(flags.Parser, "parse_args", parsed)
    monkeypatch.setattr(run, "split", splitted)
    monkeypatch.chdir(ROOT)


ALL_COMMANDS = [pytest.param(command, id=f"{name}: {command}") for name in NAMES for command in commands(name)]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_are_understood(command, only_parsed, capsys):
    words = shlex.split(command, comments=True)
    with pytest.raises(Parsed):
        status = command_line(words)
        pytest.fail(f"exit code {status}: {capsys.readouterr().err}")


@cache
def known_flags():
    """Every spelling of every flag of every command."""
    found = set()

    class Collected(Exception):
        pass

    def collect(self, args=None, namespace=None):
        found.update(flags.option_strings(self))
        raise Collected

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", collect)
        patch.setattr(run, "split", lambda argv, parser: collect(parser))
        kinds = [[name] for name in COMMANDS if name != "bench"]
        for words in [*kinds, *(["bench", name] for name in ("step", "sweep", "update", "inference", "gpu"))]:
            with pytest.raises(Collected):
                command_line(words)
    return found


@every_document
def test_flags_in_the_text_are_flags(name):
    for code in inline(name):
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*\w\b(?!-)", code) if code.startswith("--") else ():
            theirs = name == "patches/README.md" and not flag.startswith("--east")  # its table is of scripts' flags
            of_plugin = sources.plugged.slot_of(flag.removeprefix("--").replace("-", "_"))
            assert theirs or of_plugin or flag in known_flags() | FOREIGN, flag
