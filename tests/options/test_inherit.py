"""Configuration files that inherit, that are tried briefly, and errors that say which file and key they are of."""

import pytest

from east_plugins.__main__ import main
from east_plugins.errors import UsageError
from east_plugins.options import flags, sources
from east_plugins.plugins import registry


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working folder."""
    monkeypatch.chdir(tmp_path)

    def written(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return written


def parse(line):
    parser = flags.Parser(late=sources.late)
    sources.add_flags(parser)
    return sources.from_flags(vars(parser.parse_args(line.split())))


def refused(line):
    with pytest.raises(UsageError) as error:
        parse(line).resolve(100)
    said = sources.spoken(str(error.value))
    assert "\n" not in said
    return said


def test_a_file_goes_before_its_base_and_flags_before_both(write):
    write("low.yaml", "method: set\nlr: 0.3\nbatch-size: 32\nepochs: 7\n")
    write("middle.yaml", "base: low.yaml\nbatch-size: 64\nchannels-last: true\n")
    write("top.yaml", "base: middle.yaml\nepochs: 9\nchannels-last: false\n")
    config = parse("--config top.yaml --lr 0.2")
    assert (config.method, config.lr, config.batch_size, config.epochs, config.channels_last) == ("set", 0.2, 64, 9, 0)


def test_a_base_lies_relative_to_the_file_that_names_it(write):
    write("deep/low.yaml", "lr: 0.3\n")
    write("deep/middle.yaml", "base: low.yaml\n")
    write("top.yaml", "base: deep/middle.yaml\n")
    assert parse("--config top.yaml").lr == 0.3


def test_a_key_without_a_value_takes_back_what_the_base_says(write):
    write("low.yaml", "lr: 0.3\nlr-drops: [1]\n")
    write("top.yaml", "base: low.yaml\nlr-drops:\n")
    config = parse("--config top.yaml")
    assert config.lr_drops is None and config.lr == 0.3


def test_another_method_leaves_out_what_is_the_bases_own(write):
    write("low.yaml", "method: rigl+cyclic\nupdate-frequency: 100\neast-cyclic-cycles: 3\nlr: 0.3\n")
    write("top.yaml", "base: low.yaml\nmethod: set\n")
    config = parse("--config top.yaml")
    assert (config.method, config.update_frequency, config.east.cyclic, config.lr) == ("set", None, None, 0.3)


def test_options_of_a_plugin_that_the_base_names_may_stand_in_the_file(write):
    write("low.yaml", "method: gmp\n")
    write("top.yaml", "base: low.yaml\ndensity-schedule-initial: 0.5\n")
    assert parse("--config top.yaml").plugin_options == {"density_schedule_initial": 0.5}
    assert parse("--config top.yaml --density-schedule-initial 0.4").plugin_options["density_schedule_initial"] == 0.4


@pytest.mark.parametrize(
    "base, words",
    [
        ("../outside.yaml", "must be a file in"), ("/etc/passwd", "must be a file in"),
        ("linked.yaml", "must be a file in"),
        ("none.yaml", "base none.yaml is no file"), ("top.yaml", "base leads back"), ("", "must be the path of a file"),
        ("[a, b]", "must be the path of a file"), ("back.yaml", "back.yaml -> "), (".", "is no file"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_is_one_line(base, words, write, tmp_path):
    (tmp_path.parent / "outside.yaml").write_text("lr: 0.5\n")
    (tmp_path / "linked.yaml").symlink_to(tmp_path.parent / "outside.yaml")
    write("back.yaml", "base: top.yaml\n")
    write("top.yaml", f"base: {base or repr('')}\n")
    said = refused("--config top.yaml")
    assert words in said and said.startswith("--config ")


def test_a_chain_without_end_is_refused(write):
    for i in range(40):
        write(f"{i}.yaml", f"base: {i + 1}.yaml\n")
    assert "more than 20 files" in refused("--config 0.yaml")


@pytest.mark.parametrize("key", ["base", "config", "east-config", "east_config"])
def test_a_runs_own_file_names_no_other(key, write, tmp_path, capsys):
    write("secret.yaml", "cyclic: true\n")
    write("run/config.yaml", f"{key}: ../secret.yaml\nmethod: set\n")
    assert main(["analyze", "run"]) == 2
    assert "names another file" in capsys.readouterr().err
    with registry.names_of_a_file():
        assert "names another file" in refused("--config run/config.yaml")


def test_with_other_epochs_what_a_file_counts_is_scaled_and_flags_are_not(write):
    write(
        "low.yaml",
        "method: east\nepochs: 250\nlr-drops: [75, 150]\nupdate-frequency: 4000\neast-cyclic-length: 50\n"
        "east-cyclic-update-frequency: 350\nweight-decay: 0.01\nbatch-size: 64\neast-dyrelu-end: 70\n",
    )
    write("top.yaml", "base: low.yaml\n")
    short = parse("--config top.yaml --epochs 5 --east-dyrelu-end 2")
    assert short.lr_drops == [1.5, 3] and short.update_frequency == 80
    assert short.east.cyclic_length == 1 and short.east.cyclic_update_frequency == 7 and short.east.dyrelu_end == 2
    assert short.weight_decay == 0.01 and short.batch_size == 64
    assert parse("--config top.yaml --epochs 250").lr_drops == [75, 150]
    assert parse("--config top.yaml --epochs 500").east.dyrelu_end == 140
    assert parse("--config top.yaml --epochs 1").resolve(352).update_frequency == 16


def test_a_scaled_run_says_so_before_it_begins(write, tmp_path, capsys):
    write("c.yaml", "method: rigl\nmodel: cnn\nwidth: 4\nlimit: 100\nepochs: 20\nlr-drops: [10]\ndensity: 0.3\n")
    assert main("train --config c.yaml --epochs 2 --threads 1 --out run".split()) == 0
    said = capsys.readouterr().err
    assert "a tenth of it after 1; what the file counts was for 20 epochs, and is scaled" in said


@pytest.mark.parametrize(
    "text, words",
    [
        ("method: east\nepochs: 9\neast-cyclic-length: 50\n", "east-cyclic-length of low.yaml"),
        ("density: 2\n", "density of low.yaml must be in"),
        ("method: gmp\ndensity-schedule-initial: 7\n", "density-schedule-initial of low.yaml"),
        ("method: rigl\nclip-norm-of: all\n", "clip-norm-of of low.yaml needs --clip-norm"),
        ("method: set\neast_share_from: 3\n", "east_share_from of low.yaml needs --east-share"),
        ("lr-drop: 3\n", "--config low.yaml: unknown key 'lr-drop'"),
        ("lr: fast\n", "--config low.yaml: --lr"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_and_the_key_that_it_is_of(text, words, write):
    write("low.yaml", text)
    write("top.yaml", "base: low.yaml\nbatch-size: 64\n")
    assert words in refused("--config top.yaml")


def test_an_error_of_what_was_typed_names_the_flag(write):
    write("low.yaml", "density: 2\n")
    assert refused("--config low.yaml --density 3").startswith("--density must be")


def test_an_error_of_the_network_names_the_file_too(write, capsys):
    write("low.yaml", "model: cnn\nwidth: 4\nmethod: rigl\neast-share: true\nlimit: 100\n")
    assert main("train --config low.yaml --out run".split()) == 2
    assert "east-share of low.yaml" in capsys.readouterr().err
