import dataclasses
from pathlib import Path

import pytest
import yaml

from east_plugins.errors import UsageError
from east_plugins.options import flags, sources
from east_plugins.options.config import Config
from east_plugins.options.methods import METHODS, TRICKS
from east_plugins.training import runs
from east_plugins.training.jobs import jobs


def parse(line, steps=None):
    """The run that flags describe, resolved where `steps` an epoch are given; errors as the command line says them."""
    parser = flags.Parser(late=sources.late)
    sources.add_flags(parser)
    try:
        asked = sources.from_flags(vars(parser.parse_args(line.split())))
        return asked if steps is None else asked.resolve(steps)
    except UsageError as error:
        raise UsageError(sources.spoken(str(error))) from error


def test_paper_numbers_come_out_for_the_papers_run():
    # Table B.1: 250 epochs, drops at 75 and 150, two cycles of 50 epochs, peak 10, every 350 and 4000 steps
    east = parse("--method east --epochs 250 --density 0.0005 --lr-drops 75,150").resolve(352)
    assert (east.lr, east.lr_drops, east.momentum, east.weight_decay) == (0.1, [75, 150], 0.9, 1e-4)
    assert east.death_rate == 0.5
    assert (east.update_frequency, east.sparse_init, east.growth, east.death) == (
        4000,
        "ERK-floor",
        "gradient",
        "magnitude",
    )
    tricks = east.east
    assert (tricks.cyclic_cycles, tricks.cyclic_length, tricks.cyclic_multiplier) == (2, 50, 10)
    assert (tricks.cyclic_update_frequency, tricks.cyclic_pattern) == (350, "triangular")
    assert tricks.dyrelu and tricks.dyrelu_end == 74 and tricks.share and tricks.share_from == 2
    assert parse("--method set --epochs 250").resolve(352).update_frequency == 1500


@pytest.mark.parametrize("method", ["set", "rigl", "east"])
@pytest.mark.parametrize("epochs, steps", [(1, 10), (3, 21), (25, 21), (20, 352)])
def test_short_runs_still_update(method, epochs, steps):
    options = parse(f"--method {method} --epochs {epochs} --density 0.01").resolve(steps)
    assert 1 <= options.update_frequency <= max(1, epochs * steps / 10)
    if method == "east":
        schedule = options.east.density_schedule(0.01, steps, options.update_frequency, epochs * steps)
        assert sum(schedule.due(step) for step in range(epochs * steps)) >= 4
        assert schedule.close < 0.45 * epochs * steps + 4


def test_values_given_by_hand_stand_as_given():
    line = "--method rigl --epochs 2 --update-frequency 4000 --lr 0.3 --death-rate 0.1 --growth random"
    options = parse(line).resolve(5)
    assert (options.update_frequency, options.lr, options.death_rate, options.growth) == (4000, 0.3, 0.1, "random")


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_add_up(trick):
    options = parse(f"--method rigl+{trick}").resolve(5)
    assert options.growth == "gradient"
    on = {
        "cyclic": options.east.cyclic,
        "dyrelu": options.east.dyrelu,
        "share": options.east.share,
        "connected": options.sparse_init == "connected",
        "dctps": options.dctps,
    }
    assert on == {name: name == trick for name in TRICKS}


def test_east_leaves_sharing_out_on_dctps_layers():
    for line in ("--method east --dctps", "--method east+dctps"):
        options = parse(line).resolve(5)
        assert options.dctps and options.east.cyclic and options.east.dyrelu and not options.east.share


@pytest.mark.parametrize("method", METHODS)
def test_resolved_options_come_back_from_yaml(method, tmp_path):
    options = parse(f"--method {method} --epochs 25").resolve(21)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options.as_dict()))
    again = parse(f"--config {tmp_path / 'c.yaml'}")
    assert again.resolve(21) == options


def test_flags_go_before_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("method: set\nepochs: 7\nlr-drops: [1, 2.5]\neast-dyrelu: true\n")
    options = parse(f"--config {tmp_path / 'c.yaml'} --epochs 9")
    assert (options.method, options.epochs, options.east.dyrelu) == ("set", 9, True)
    assert options.lr_drops == pytest.approx([1 * 9 / 7, 2.5 * 9 / 7])  # of the file, scaled with the epochs


@pytest.mark.parametrize("new", [*METHODS, "rigl+connected", "east+dctps", "set+cyclic"])
@pytest.mark.parametrize("old", [*METHODS, "rigl+connected", "east+dctps", "set+cyclic"])
def test_a_method_given_by_hand_is_not_that_of_the_runs_config(old, new, tmp_path):
    options = parse(f"--method {old} --epochs 25 --lr 0.3").resolve(21)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options.as_dict()))
    switched = parse(f"--config {tmp_path / 'c.yaml'} --method {new}").resolve(21)
    assert switched == parse(f"--method {new} --recipe {options.recipe} --epochs 25 --lr 0.3").resolve(21)


def test_what_two_methods_have_in_common_stays_as_the_file_says(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("method: rigl+cyclic+dyrelu\ndctps: true\ndensity: 0.01\nupdate-frequency: 100\n"
                    "east-cyclic-multiplier: 3\neast-dyrelu-end: 2\n")  # fmt: skip
    options = parse(f"--config {file} --method rigl+cyclic")
    assert (options.dctps, options.density, options.update_frequency) == (True, 0.01, 100)
    assert options.east.cyclic_multiplier == 3 and not options.east.dyrelu and options.east.dyrelu_end is None
    assert parse(f"--config {file} --method set --east-cyclic").east.cyclic_multiplier == 3
    assert parse(f"--config {file} --method set").update_frequency is None


def test_a_file_that_names_no_method_keeps_all_its_keys(tmp_path):
    (tmp_path / "c.yaml").write_text("growth: random\nupdate-frequency: 9\neast-cyclic: true\n")
    options = parse(f"--config {tmp_path / 'c.yaml'} --method rigl")
    assert (options.growth, options.update_frequency, options.east.cyclic) == ("random", 9, True)


def test_the_phase_out_ends_before_the_first_drop_in_whatever_order():
    assert parse("--method east --lr-drops 10,5").resolve(21).east.dyrelu_end == pytest.approx(5 - 250 / 250)


@pytest.mark.parametrize("off", ["cyclic", "dyrelu", "share"])
def test_a_trick_that_is_off_in_the_file_is_off(off, tmp_path):
    (tmp_path / "c.yaml").write_text(f"method: east\neast-{off}: false\n")
    options = parse(f"--config {tmp_path / 'c.yaml'}").resolve(5)
    assert [name for name in ("cyclic", "dyrelu", "share") if not getattr(options.east, name)] == [off]
    runs.write_config(tmp_path, options)
    assert runs.read_config(tmp_path).resolve(5) == options
    assert getattr(parse(f"--config {tmp_path / 'c.yaml'} --east-{off}").resolve(5).east, off)
    assert getattr(parse(f"--config {tmp_path / 'c.yaml'} --east").resolve(5).east, off)


def test_dctps_that_is_off_in_the_file_is_off(tmp_path):
    (tmp_path / "c.yaml").write_text("method: east+dctps\ndctps: false\n")
    options = parse(f"--config {tmp_path / 'c.yaml'}").resolve(5)
    assert not options.dctps and options.east.share
    assert parse(f"--config {tmp_path / 'c.yaml'} --dctps").dctps


def test_an_unknown_key_is_answered_with_the_nearest_only(tmp_path):
    (tmp_path / "c.yaml").write_text("epochz: 3")
    with pytest.raises(UsageError) as error:
        parse(f"--config {tmp_path / 'c.yaml'}")
    assert str(error.value).endswith("unknown key 'epochz'; did you mean epochs? see --help")


def test_itop_spellings_are_taken():
    options = parse("--update_frequency 7 --sparse_init uniform --death-rate 0.3 --l2 0.5 --batch_size 9")
    assert (options.update_frequency, options.sparse_init) == (7, "uniform")
    assert (options.weight_decay, options.batch_size) == (0.5, 9)


@pytest.mark.parametrize(
    "text, words",
    [
        ("epochz: 3", "did you mean epochs"),
        ("epochs: many", "--epochs: invalid int"),
        ("epochs: true", "epochs must be a whole number, got true"),
        ("nesterov: 'no'", "nesterov must be true or false, got 'no'"),
        ("config: other.yaml", "config cannot be a key"),
        ("- 1\n- 2", "must hold keys and values"),
        ("a: [", "cannot be read as YAML"),
        ("method: rigel", "did you mean rigl"),
    ],
)
def test_wrong_files_are_named(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError, match=words) as error:
        parse(f"--config {tmp_path / 'c.yaml'}")
    assert "c.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--density 0", r"--density must be in \(0, 1\]"),
        ("--density 1.5", "--density"),
        ("--density nan", "--density"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--threads 100000", "--threads must be at most 1024, got 100000"),
        ("--width 1000000", "--width must be at most 512"),
        ("--image-size 100000", "--image-size must be at most 4096"),
        ("--image-size 1", "--image-size must be at least 4"),
        ("--batch-size 100000000", "--batch-size must be at most 1048576"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--momentum 1", "--momentum must be from 0 on and below 1, got 1"),
        ("--device=", "--device is empty: allowed are cpu, cuda"),
        ("--config=", "--config is empty: it must name a YAML file"),
        ("--epochs x", "--epochs: invalid int"),
        ("--lr -1", "--lr"),
        ("--lr nan", r"--lr must be in \[0, 1000000"),
        ("--lr 1e308", "--lr"),
        ("--weight-decay inf", "--weight-decay"),
        ("--seed 100000000000000000000", "--seed"),
        ("--lr-drops nan", "--lr-drops must be epochs from 0 on, got nan"),
        ("--lr-drops 3,inf", "--lr-drops"),
        ("--lr-drops=-1", "--lr-drops"),
        ("--lr-drops 3,x", "--lr-drops: must be epochs joined by commas"),
        ("--method granet --initial-density nan", r"--density-schedule-initial must be in \(0, 1\]"),
        ("--method granet --initial-density 1.5", "--density-schedule-initial"),
        ("--nesterov --momentum 0", "--nesterov needs --optimizer sgd and --momentum over 0, got sgd and 0"),
        ("--nesterov --optimizer adam", "--nesterov needs"),
        ("--method granet+cyclic", "--method granet.cyclic: --east-cyclic and --density-schedule gradual both set"),
        ("--method gmp --east-cyclic", "--density-schedule gradual"),
        ("--method east --density-schedule one-shot", "--density-schedule one-shot"),
        ("--east-cyclic --east-cyclic-length 1e308", "--east-cyclic-length must be a number of epochs"),
        ("--method rigel", "did you mean rigl"),
        ("--method rigl+dyrulu", "--method rigl.dyrulu: unknown trick 'dyrulu'; did you mean dyrelu"),
        ("--growth gradeint", "did you mean gradient"),
        ("--death magnitud", "did you mean magnitude"),
        ("--sparse-init ERQ", "did you mean"),
        ("--decay-schedule cosin", "did you mean cosine"),
        ("--method set --east-cyclic-length 3", "--east-cyclic-length needs --east-cyclic"),
        ("--method set --east-dyrelu-end 3", "--east-dyrelu-end needs --east-dyrelu"),
        ("--method set --east-share-from 3", "--east-share-from needs --east-share"),
        ("--east-dyrelu-start 9 --east-dyrelu-end 3", "--east-dyrelu-end 3 lies before"),
        ("--east-cyclic-pattern saw", "--east-cyclic-pattern"),
        ("--east-share-from 0", "--east-share-from must be at least 1"),
        ("--east-config nowhere.yaml", "--east-config nowhere.yaml: no such file"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
        ("--optimizer lamb", "--optimizer: invalid choice"),
    ],
)
def test_wrong_flags_are_named(line, words):
    with pytest.raises(UsageError, match=words) as error:
        parse(line, steps=352)
    assert "\n" not in str(error.value)


def test_east_config_file(tmp_path):
    (tmp_path / "e.yaml").write_text("cyclic: true\ncyclic-cycles: 3\neast-dyrelu: true\n")
    east = parse(f"--method rigl --east-config {tmp_path / 'e.yaml'} --east-cyclic-multiplier 4").east
    assert (east.cyclic, east.cyclic_cycles, east.cyclic_multiplier) == (True, 3, 4)
    assert east.dyrelu and not east.share
    (tmp_path / "e.yaml").write_text("cyclik: true\n")
    with pytest.raises(UsageError, match="did you mean cyclic"):
        parse(f"--east-config {tmp_path / 'e.yaml'}")


def test_every_option_has_a_flag_and_help():
    parser = flags.Parser(late=sources.late)
    sources.add_flags(parser)
    text = parser.format_help()
    for field in dataclasses.fields(Config):
        if field.name not in ("east", "plugin_options", "origins"):
            assert "--" + field.name.replace("_", "-") in text


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_can_be_read_and_resolved(path, tmp_path):
    grid = "grid" in yaml.safe_load(path.read_text()) and sources.read(path).blocks
    for job in jobs(None, None, None, tmp_path, {"config": path}) if grid else [None]:
        options = (job.options if job else parse(f"--config {path}")).resolve(352)
        assert (options.update_frequency or 1) >= 1 and options.lr > 0


def test_every_method_and_shipped_config_is_documented():
    root = Path(__file__).parents[2]
    text = " ".join((root / "configs" / "README.md").read_text().split())
    methods = text.partition("Methods: ")[2].partition(";")[0].partition(".")[0]
    assert methods.replace("`", "").split(", ") == list(METHODS)
    table = (root / "configs" / "README.md").read_text()
    assert not [path.name for path in (root / "configs").glob("*.yaml") if f"`{path.name}`" not in table]


def test_dctps_rows_are_the_papers():
    # Table B.1: Adam 1e-3, 200 epochs, wd 5e-4, n 2, l 50, m 3, every 100 steps in and after the cycles
    configs = Path(__file__).parents[2] / "configs"
    options = parse(f"--config {configs / 'dctps_east_cifar10_resnet50.yaml'}").resolve(352)
    assert (options.optimizer, options.lr, options.epochs, options.weight_decay) == ("adam", 1e-3, 200, 5e-4)
    assert options.dctps and options.update_frequency == options.east.cyclic_update_frequency == 100
    east = options.east
    assert (east.cyclic_cycles, east.cyclic_length, east.cyclic_multiplier, east.share) == (2, 50, 3, False)


def test_a_trick_that_the_file_of_east_switches_off_stays_off(tmp_path):
    (tmp_path / "east.yaml").write_text("cyclic: false\ndyrelu_end: 3\n")
    east = parse(f"--method east --epochs 8 --east-config {tmp_path / 'east.yaml'}").resolve(5).east
    assert (east.cyclic, east.dyrelu, east.share, east.dyrelu_end) == (False, True, True, 3)
    again = parse(f"--method east --epochs 8 --east-cyclic --east-config {tmp_path / 'east.yaml'}").east
    assert again.cyclic


def test_the_files_for_cifar_leave_the_start_to_the_method():
    configs = Path(__file__).parents[2] / "configs"
    for path in configs.glob("cifar*_resnet*.yaml"):
        assert parse(f"--config {path} --method rigl+connected").resolve(352).sparse_init == "connected"
        assert parse(f"--config {path} --method rigl").resolve(352).sparse_init == "ERK"


def test_itops_own_flags_mean_what_they_mean_there():
    plain, itop = parse("--method rigl --epochs 10", 50), parse("--sparse --method rigl --epochs 5 --multiplier 2", 50)
    assert itop == plain and itop.lr_drops == [5.0, 7.5]
    fixed = parse("--method rigl --fix", 50)
    assert not any(fixed.schedule().due(step) for step in range(1, 12_500)) and fixed.label == "rigl[fix=True]"
    assert parse("--method static --fix", 50).label == "static"


@pytest.mark.parametrize("line", ["--multiplier 0", "--method rigl --fix --update-frequency 3", "--method east --fix"])
def test_what_itops_flags_cannot_is_refused(line):
    with pytest.raises(UsageError, match="--(multiplier|fix)"):
        parse(line, 50)


def test_updates_in_cycles_are_ten_steps_apart_at_least_where_the_cycle_is_long_enough():
    for epochs, steps, expected in ((250, 352, 350), (20, 20, 10), (2, 20, 2), (1, 8, 1)):
        tricks = Config(method="rigl+cyclic", epochs=epochs).resolve(steps).east
        assert tricks.cyclic_update_frequency == expected
