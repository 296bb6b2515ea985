"""What cannot be, in one table: every row ends with one line that names the flag, key or file, and writes nothing."""

import dataclasses
import shlex

import pytest
import torch
from torch import nn

from east_plugins import Config, Engine, Masking, share, train
from east_plugins.__main__ import main
from east_plugins.errors import EastError
from east_plugins.plugins.activation import PhaseOut, attach, factory
from east_plugins.plugins.density import Constant, Cyclic, Gradual

SMALL = "train --out new --method rigl --model cnn --width 4 --data digits --limit 60 --epochs 3 --density 0.5 "
PAIR = "compare --out new --model cnn --width 4 --data digits --limit 60 --epochs 1 "

#: Command lines, after SMALL where they begin with `+`, after PAIR where with `*`; and how the answer begins. The
#: working folder holds one file, called `file`.
COMMANDS = {
    "+--density 0": "--density must be in (0, 1], got 0.0",
    "+--density 1.5": "--density must be in (0, 1], got 1.5",
    "+--density nan": "--density must be in (0, 1], got nan",
    "+--density half": "--density: invalid float value: 'half'",
    "+--density -0.1": "--density must be in (0, 1], got -0.1",
    "+--density 1e-9": "--density gives 0 active weights; allowed are 4 (one a layer) to 1636",
    "+--epochs 0": "--epochs must be at least 1, got 0",
    "+--epochs -3": "--epochs must be at least 1, got -3",
    "+--epochs 1.5": "--epochs: invalid int value: '1.5'",
    "+--epochs 99999999999999999999": "--east-cyclic-length must be a number of epochs, got 2e+19",
    "+--batch-size 0": "--batch-size must be at least 1, got 0",
    "+--batch-size many": "--batch-size: invalid int value: 'many'",
    "+--lr -1": "--lr must be in [0, 1000000.0], got -1.0",
    "+--lr inf": "--lr must be in [0, 1000000.0], got inf",
    "+--momentum 1": "--momentum must be from 0 on and below 1, got 1.0",
    "+--momentum -0.1": "--momentum must be from 0 on and below 1, got -0.1",
    "+--weight-decay -1": "--weight-decay must be in [0, 1000000.0], got -1.0",
    "+--weight-decay nan": "--weight-decay must be in [0, 1000000.0], got nan",
    "+--lr-drops 1,x": "--lr-drops: must be epochs joined by commas, or none, got '1,x'",
    "+--lr-drops=-1": "--lr-drops must be epochs from 0 on, got -1.0",
    "+--lr-drops nan": "--lr-drops must be epochs from 0 on, got nan",
    "+--width 0": "--width must be at least 1, got 0",
    "+--width 100000": "--width must be at most 512, got 100000",
    "+--image-size 1": "--image-size must be at least 4, got 1",
    "+--image-size 100000": "--image-size must be at most 4096, got 100000",
    "+--limit 0": "--limit must be at least 1, got 0",
    "+--limit 5": "--data digits: 1 images are left for training, needed are at least 2",
    "+--validation 1": "--validation 1.0: allowed are shares from 0 to below 1",
    "+--validation -0.1": "--validation -0.1: allowed are shares from 0 to below 1",
    "+--threads 0": "--threads must be at least 1, got 0",
    "+--threads 100000": "--threads must be at most 1024, got 100000",
    "+--seed x": "--seed: invalid int value: 'x'",
    "+--seed 99999999999999999999999": (
        "--seed must be in [-9223372036854775808, 18446744073709551615], got 99999999999999999999999"
    ),
    "+--device tpu": "--device tpu cannot be used: Expected one of cpu, cuda, ipu,",
    '+--device ""': "--device is empty: allowed are cpu, cuda, cuda:1, ...",
    "+--device cuda:99": "--device cuda:99 cannot be used: Found no NVIDIA driver on y",
    "+--save-every -1": "--save-every must be minutes from 0, got -1.0",
    "+--save-every nan": "--save-every must be minutes from 0, got nan",
    "+--clip-norm 0": "--clip-norm must be over 0, got 0.0",
    "+--clip-norm nan": "--clip-norm must be over 0, got nan",
    "+--clip-norm-of active": "--clip-norm-of needs --clip-norm",
    "+--death-rate 1.5": "--death-rate must be in [0, 1], got 1.5",
    "+--death-rate -1": "--death-rate must be in [0, 1], got -1.0",
    "+--death-rate nan": "--death-rate must be in [0, 1], got nan",
    "+--update-frequency 0": "--update-frequency must be at least 1, got 0",
    "+--update-frequency -5": "--update-frequency must be at least 1, got -5",
    "+--method rgil": "unknown --method 'rgil'; did you mean",
    "+--method rigl+": "--method rigl+: unknown trick '';",
    "+--method +dyrelu": "unknown --method '';",
    "+--method rigl+dyrelux": "--method rigl+dyrelux: unknown trick 'dyrelux'; did you mean",
    "+--method rigl+dyrelu+dyrelu": "--method rigl+dyrelu+dyrelu: trick dyrelu is there twice; allowed is once",
    '+--method ""': "unknown --method '';",
    "+--recipe best": "unknown --recipe 'best'; did you mean",
    "+--model resnet999": "unknown --model 'resnet999'; did you mean",
    "+--model torchvision:nothing": "unknown --model 'torchvision:nothing'; did you mean",
    "+--growth gradeint": "--growth: unknown growth 'gradeint'; did you mean",
    "+--growth os:system": (
        "--growth: growth 'os:system' is Python's own and no growth plugin; allowed are functions and classes written"
    ),
    "+--growth no_such_module:rule": "--growth: growth 'no_such_module:rule' cannot be imported: M",
    "+--growth os:nothing": "--growth: growth 'os:nothing' cannot be imported: AttributeE",
    "+--death os.path:join": (
        "--death: pruning 'os.path:join' is Python's own and no pruning plugin; allowed are functions and classes wri"
    ),
    "+--redistribution x": "--redistribution: unknown redistribution 'x';",
    "+--sparse-init ERKK": "--sparse-init: unknown allocation 'ERKK'; did you mean",
    "+--weight-init zero": "--weight-init: invalid choice: 'zero'",
    "+--decay-schedule cos": "--decay-schedule: unknown rate 'cos'; did you mean",
    "+--density-schedule cyclicc": "--density-schedule: unknown density 'cyclicc'; did you mean",
    "+--prune-scope globl": "--prune-scope: invalid choice: 'globl'",
    "+--prune-rounding round": "--prune-rounding: invalid choice: 'round'",
    "+--transform builtins:id": (
        "--transform: transform 'builtins:id' is Python's own and no transform plugin; allowed are functions and clas"
    ),
    "+--transform nothing": "--transform: unknown transform 'nothing';",
    "+--dctps-engine fast": "--dctps-engine: invalid choice: 'fast'",
    "+--optimizer adamx": "--optimizer: invalid choice: 'adamx'",
    "+--engine fast": "--engine: invalid choice: 'fast'",
    "+--quiet-branches some": "--quiet-branches: invalid choice: 'some'",
    "+--tested first": "--tested: invalid choice: 'first'",
    "+--validation-split random": "--validation-split: invalid choice: 'random'",
    "+--crop-padding none": "--crop-padding: invalid choice: 'none'",
    "+--on-nonfinite crash": "--on-nonfinite: invalid choice: 'crash'",
    "+--config missing.yaml": "--config missing.yaml: no such file",
    '+--config ""': "--config is empty: it must name a YAML file",
    "+--config .": "--config . cannot be read as YAML: Is a directory",
    "+--data cifar1": "unknown --data 'cifar1'; did you mean",
    "+--data folder": "--data is folder, which needs --data-dir, a folder with train/<class>/ and test/<class>/",
    "+--data folder --data-dir nowhere": (
        "--data-dir nowhere: no such folder; expected is one with train/<class>/ and test/<class>/"
    ),
    "+--data-dir nowhere": (
        "--data-dir nowhere is not read by --data digits; --data that reads a folder: mnist, fashionmnist, cifar10, c"
    ),
    "+--east-cyclic-cycles 0": "--east-cyclic-cycles needs --east-cyclic",
    "+--east-cyclic-length 0": "--east-cyclic-length must be a number of epochs, got 0.0",
    "+--east-cyclic --east-cyclic-length 5": (
        "--east-cyclic-multiplier 10 takes the density 0.5 to 5; allowed is at most 2"
    ),
    "+--east-cyclic-multiplier 0.5": "--east-cyclic-multiplier needs --east-cyclic",
    "+--east-cyclic-pattern sine": "--east-cyclic-pattern: invalid choice: 'sine'",
    "+--east-cyclic-update-frequency 0": "--east-cyclic-update-frequency needs --east-cyclic",
    "+--east-dyrelu-type dyreluu": "--east-dyrelu-type needs --east-dyrelu",
    "+--east-dyrelu-type os:close": "--east-dyrelu-type needs --east-dyrelu",
    "+--east-dyrelu --east-dyrelu-start 1 --east-dyrelu-end 0.5": (
        "--east-dyrelu-end 0.5 lies before --east-dyrelu-start 1; allowed is the same epoch or a later one"
    ),
    "+--east-dyrelu-reduction 0": "--east-dyrelu-reduction must be at least 1, got 0",
    "+--east-dyrelu-blend both": "--east-dyrelu-blend: invalid choice: 'both'",
    "+--east-share-from 0": "--east-share-from must be at least 1, got 0",
    "+--east-share-scale two": "--east-share-scale: invalid choice: 'two'",
    "+--east-config missing.yaml": "--east-config missing.yaml: no such file",
    "+--est-cyclic": "unrecognized arguments: --est-cyclic; did you mean",
    "+--multiplier 0": "--multiplier must be at least 1, got 0",
    "+--initial-density 2": "--density-schedule-initial is no option of --density-schedule constant; its options: none",
    "+--cuda-graph": "--cuda-graph needs a CUDA device, and --device is cpu",
    "+--compile --engine sparse": (
        "--compile goes with --engine dense: the sparse engine has compiled kernels of its own"
    ),
    "+--dctps --east-share": (
        "--dctps --east-share: weight sharing is left out with DCTpS, to prevent conflicts with the DCT matrices (EAS"
    ),
    "+--method static --update-frequency 1": (
        "--method static has no topology updates: --update-frequency needs a run that has"
    ),
    "train": "the following arguments are required: --out",
    "train --out": "--out: expected one argument",
    "train --out file": "--out file cannot be made: file is a file",
    "train --out new extra": "unrecognized arguments: extra",
    "trian --out new": "unknown command 'trian'; did you mean",
    "*--methods rigl,": "unknown --method '';",
    '*--methods ""': "unknown --method '';",
    "*--methods rigl,rigl": "--methods must differ, got rigl twice",
    "*--methods rigl,xyz": "unknown --method 'xyz';",
    "*--methods rigl --sparsities 1": "--sparsities must be in [0, 1), got 1",
    "*--methods rigl --sparsities x": "--sparsities must be numbers joined by commas, got 'x'",
    "*--methods rigl --sparsities 0.9,0.9": "--sparsities must differ, got 0.9 twice",
    "*--methods rigl --seeds 0,0": "--seeds must differ, got 0 twice",
    "*--methods rigl --seeds 0.5": "--seeds must be numbers joined by commas, got '0.5'",
    '*--methods rigl --seeds ""': "--seeds must be numbers joined by commas, got ''",
    "*--methods rigl --jobs 0": "--jobs must be at least 1, got 0",
    "*--methods rigl --jobs 100000": "--jobs must be at most 256, got 100000",
    "*--methods rigl --density 0.1": "--density cannot be given to compare; it has --methods, --sparsities and --seeds",
    "analyze": "the following arguments are required: RUN",
    "analyze nowhere": "nowhere is no run directory: it has no config.yaml",
    "analyze .": ". is no run directory: it has no config.yaml",
    "analyze file": "file is neither the folder of a run nor a file of --east-state",
    "analyze . --images 0": "--images must be at least 2, got 0",
    "analyze . --network x": ". is no run directory: it has no config.yaml",
    "export . --format c --out a.c": ". is no run directory: it has no config.yaml",
    "export nowhere --format c --out a.c": "nowhere is no run directory: it has no config.yaml",
    "export . --format tflite --out a": "--format: invalid choice: 'tflite'",
    "export . --format c": "the following arguments are required: --out",
    "info --density 2": "--density must be in (0, 1], got 2.0",
    "info --model resnet20 --density 0.00001": (
        "--density gives 3 active weights; allowed are 22 (one a layer) to 270896"
    ),
    "info --classes 0": "--classes must be at least 1, got 0",
    "info --channels 0": "--channels must be at least 1, got 0",
    "bench": "bench needs a benchmark's name: step, sweep, update, inference, gpu, startup",
    "bench speed": "unknown benchmark 'speed'; did you mean",
    "bench step --repeats 0": "--repeats must be at least 1, got 0",
    "bench step --density 0": "--density must be in (0, 1], got 0.0",
    "bench step --masks none": "--masks: invalid choice: 'none'",
    "bench step --batch-size 0": "--batch-size must be at least 1, got 0",
    "bench step --itop nowhere": "--itop nowhere is no checkout of ITOP: it has no sparselearning/core.py",
    "bench update --threads 0": "--threads must be at least 1, got 0",
    "run": "run needs a SCRIPT, or --module and a module's name, before the script's own arguments",
    "run nowhere.py": "run: no such script: nowhere.py",
    "run --module no_such_module_at_all": "run: no such module: no_such_module_at_all",
    "run . ": "run: no such script: .",
    "patch": "the following arguments are required: CHECKOUT",
    "patch nowhere": (
        "patch: nowhere is no checkout that a patch is for; there are patches for https://github.com/IlanPrice/DCTpS,"
    ),
    "patch .": (
        "patch: . is no checkout that a patch is for; there are patches for https://github.com/IlanPrice/DCTpS, https"
    ),
    "experiment nothing --out new": "unknown part 'nothing';",
    "experiment all --out new --seeds x": "unknown part 'all'; did you mean",
    "plugins x": "unrecognized arguments: x",
    "--nothing": "unknown command '--nothing';",
    "nothing": "unknown command 'nothing'; did you mean",
    "+--model torchvision:resnet18": "model torchvision:resnet18 has a fixed width and takes 3 channels, got --width 4",
    "+--death math:sqrt": (
        "--death: pruning 'math:sqrt' is Python's own and no pruning plugin; allowed are functions and classes writte"
    ),
    "+--transform no_module_here:f": "--transform: transform 'no_module_here:f' cannot be imported",
    "+--east-cyclic-length 1": "--east-cyclic-length needs --east-cyclic",
    "+--east-cyclic --east-cyclic-multiplier 0.5": "--east-cyclic-multiplier must be at least 1, got 0.5",
    "+--east-cyclic --east-cyclic-multiplier nan": "--east-cyclic-multiplier must be at least 1, got nan",
    "+--east-dyrelu --east-dyrelu-type dyreluu": "--east-dyrelu-type: unknown activation 'dyreluu'; did you mean",
    "+--east-dyrelu --east-dyrelu-type os:close": (
        "--east-dyrelu-type: activation 'os:close' is Python's own and no activation plugin; allowed are functions an"
    ),
    "+--east-dyrelu --east-dyrelu-end 99": "--east-dyrelu-end 99 lies after the last of 3 epochs",
    "+--east-dyrelu --east-dyrelu-start -1": "--east-dyrelu-start must be a number of epochs, got -1.0",
    "+--dctps --transform dctps": "the model has DCT layers (--dctps) already",
    "+--method east --epochs 1": (
        "--epochs 1: a run of 1 steps is too short for the phase-out of --method east, which must end before the firs"
    ),
    "+--nesterov --momentum 0": "--nesterov needs --optimizer sgd and --momentum over 0, got sgd and 0",
    "+--nesterov --optimizer adam": "--nesterov needs --optimizer sgd and --momentum over 0, got adam and 0.9",
    "+--data mnist --data-dir .": "--data-dir .: MNIST/raw/train-images-idx3-ubyte is missing there; it holds file",
    "+--data cifar10 --data-dir .": "--data-dir .: cifar-10-batches-py/data_batch_1 is missing there; it holds file",
    "+--data folder --data-dir .": "--data-dir .: train is missing there; it holds file",
    "+--data digits --image-size 3": "--image-size must be at least 4, got 3",
    "+--validation 0.99": "--data digits: 0 images are left for training, needed are at least 2",
    "+--sparse-init resume": (
        "--sparse-init resume: 1636 of the model's 1636 weights are nonzero, and the density asks for 818; give densi"
    ),
    "+--quiet-branches loops": "--quiet-branches: the model has no residual branch that ends with a batch norm",
    "+--threads -1": "--threads must be at least 1, got -1",
    "+--threads 1.5": "--threads: invalid int value: '1.5'",
    "+--model": "--model: expected one argument",
    "+--seed 1 --seed": "--seed: expected one argument",
}

#: Contents of a file for `train --config`, and how the answer begins.
CONFIGS = {
    "- a\n- b\n": "--config c.yaml must hold keys and values such as 'density: 0.001'",
    "3": "--config c.yaml must hold keys and values such as 'density: 0.001'",
    "": "--config c.yaml must hold keys and values such as 'density: 0.001'",
    "methd: rigl\n": "--config c.yaml: unknown key 'methd'; did you mean",
    "east_cyclicc: true\n": "--config c.yaml: unknown key 'east_cyclicc'; did you mean",
    "lr: 0.1\nlr: 0.2\n": "--config c.yaml says lr twice; allowed is once",
    "epochs: many\n": "--config c.yaml: --epochs: invalid int value: 'many'",
    "epochs: [1, 2]\n": "--config c.yaml: --epochs: invalid int value: '1,2'",
    "method: 3\n": "--config c.yaml: unknown --method '3';",
    "method: {a: b}\n": "--config c.yaml: unknown --method \"{'a': 'b'}\";",
    "a: [1,\n": (
        "--config c.yaml cannot be read as YAML: while parsing a flow node expected the node content, but found '<str"
    ),
    "a:\n\t- 1\n": (
        "--config c.yaml cannot be read as YAML: while scanning for the next token found character '\\t' that cannot"
    ),
    "lr: !!python/object/apply:os.system [ls]\n": (
        "--config c.yaml cannot be read as YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:pyt"
    ),
    "\u0000\u0001": (
        "--config c.yaml cannot be read as YAML: unacceptable character #x0000: special characters are not allowed"
    ),
    "nesterov: maybe\n": "--config c.yaml: nesterov must be true or false, got 'maybe'",
    "epochs: true\n": "--config c.yaml: epochs must be a whole number, got true",
    "epochs: -1\n": "epochs of c.yaml must be at least 1, got -1",
    "engine: fast\n": "--config c.yaml: --engine: invalid choice: 'fast'",
    "lr_drops: a,b\n": "--config c.yaml: --lr-drops: must be epochs joined by commas, or none, got 'a,b'",
    "lr_drops: [1, x]\n": "--config c.yaml: --lr-drops: must be epochs joined by commas, or none, got '1,x'",
    "lr_drops: {a: 1}\n": "--config c.yaml: --lr-drops: must be epochs joined by commas, or none, got \"{'a': 1}\"",
    "lr: .inf\n": "lr of c.yaml must be in [0, 1000000.0], got inf",
    "density: .nan\n": "density of c.yaml must be in (0, 1], got nan",
    "seed: 2020-01-01\n": "--config c.yaml: --seed: invalid int value: '2020-01-01'",
    "epochs: 1e30\n": "--config c.yaml: --epochs: invalid int value: '1e30'",
    "a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]\n": "--config c.yaml repeats parts of itself by * and &: write them out",
    "growth: no.such:thing\n": "--config c.yaml: --growth: growth 'no.such:thing' cannot be",
    "methods: rigl,set\n": "--config c.yaml: unknown key 'methods'; did you mean",
    "east_dyrelu: true\neast_dyrelu_end: soon\n": "--config c.yaml: --east-dyrelu-end: invalid float value: 'soon'",
    "data_dir: 3\n": (
        "data_dir of c.yaml 3 is not read by --data digits; --data that reads a folder: mnist, fashionmnist, cifar10, "
        "cifar10"
    ),
    "1: 2\n": "--config c.yaml: unknown key '1'",
}


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def host(**options):
    model = network()
    made = Masking(torch.optim.SGD(model.parameters(), 0.1), **options)
    return made, model


def masked(density=0.5, made=None, **options):
    made, model = host() if made is None else made
    made.add_module(model, density=density, **options)
    return made


#: Calls from Python, and a part of what the exception says.
CALLS = [
    (lambda: host(death_rate=2), "`death_rate` must be in [0, 1], got 2"),
    (lambda: host(death_rate=float("nan")), "`death_rate` must be"),
    (lambda: host(death_mode="magnitud"), "unknown pruning 'magnitud'; did you mean magnitude"),
    (lambda: host(growth_mode="gradeint"), "unknown growth 'gradeint'; did you mean gradient"),
    (lambda: host(growth_mode="os:system"), "is Python's own and no growth plugin"),
    (lambda: host(growth_mode="no_such:rule"), "cannot be imported"),
    (lambda: host(redistribution_mode="x"), "unknown redistribution 'x'"),
    (lambda: host(growth_death_ratio=0.5), "growth_death_ratio must be 1"),
    (lambda: host(prune_scope="globl"), "`prune_scope` must be one of local"),
    (lambda: host(prune_rounding="up"), "`prune_rounding` must be one of floor, ceil"),
    (lambda: Masking(torch.optim.LBFGS(network().parameters())), "LBFGS"),
    (lambda: masked(0), "`density` must be in (0, 1], got 0"),
    (lambda: masked(float("nan")), "`density` must be in (0, 1]"),
    (lambda: masked("many"), "density must be a number"),
    (lambda: masked(1e-9), "active weights; allowed are"),
    (lambda: masked(sparse_init="ERKK"), "unknown allocation 'ERKK'; did you mean ERK"),
    (lambda: masked(sparse_init="connected"), "input_shape"),
    (lambda: masked(weight_init="zero"), "`weight_init` must be default or sparse-fan-in"),
    (lambda: masked(exclude="layer9"), "exclude='layer9' matches no module and no parameter"),
    (lambda: masked(exclude=nn.LSTM), "matches no module"),
    (lambda: masked(made=(host()[0], network())), "the optimizer has none of the model's"),
    (lambda: masked(made=(host()[0], nn.ReLU())), "no conv or linear weights"),
    (lambda: masked(made=host(keep_connected=True)), "keep_connected needs"),
    (lambda: masked(made=host(schedule=Constant(0.2, 3))), "differs from the schedule's target"),
    (lambda: masked().add_module(network()), "add_module takes one module"),
    (lambda: host()[0].step(), "add_module"),
    (lambda: host()[0].state_dict(), "add_module"),
    (lambda: masked().remove_weight("conv"), "conv"),
    (lambda: masked().load_state_dict({}), "this is no host's state"),
    (lambda: masked().load_state_dict({"masks": {}, "steps": 0}), "the saved masks do not fit the model"),
    (lambda: masked().truncate_weights(), "has no momentum"),
    (lambda: masked().gradient_norm(of="some"), "some"),
    (lambda: Engine(masked(), (3, 8, 8), "fast"), "`engine` must be one of auto, dense, sparse"),
    (lambda: Masking.of("rgil", network(), None, density=0.1, steps=10), "rgil"),
    (lambda: Constant(1.5, 10), "1.5"),
    (lambda: Cyclic(0.5, multiplier=4, length=10), "at most 2"),
    (lambda: Gradual(0.5, initial=2.0, start=0, stop=10, frequency=1), "2"),
    (lambda: share(nn.Sequential(nn.ReLU())), "no"),
    (lambda: factory("dyreluu"), "unknown activation 'dyreluu'"),
    (lambda: attach(nn.Sequential(nn.Linear(3, 3)), factory("dyrelu-b"), (3,)), "ReLU"),
    (lambda: PhaseOut(10, 5), "10"),
    (lambda: Config(epochs=0), "`epochs` must be at least 1"),
    (lambda: Config(epochs="3"), "`epochs` must be a whole number, got '3'"),
    (lambda: Config(nesterov=3), "`nesterov` must be true or false, got 3"),
    (lambda: Config(lr="0.1"), "`lr` must be a number, got '0.1'"),
    (lambda: Config(growth=3), "`growth` must be a text, got 3"),
    (lambda: Config(epochs=True), "`epochs` must be a whole number, got True"),
    (lambda: Config(method="rgil"), "rgil"),
    (lambda: Config(growth="gradeint"), "gradeint"),
    (lambda: Config(density=float("inf")), "`density` must be in (0, 1]"),
    (lambda: dataclasses.replace(Config(), optimizer="adamx"), "optimizer"),
    (lambda: train(Config(density=0.5, method="rigl", data="folder", data_dir="nowhere"), "new"), "nowhere"),
    (lambda: train(Config(density=0.5, method="rigl", device="cuda:77"), "new"), "cuda:77"),
]


def words_of(row):
    begins = {"+": SMALL, "*": PAIR}.get(row[0], "")
    return shlex.split(begins + row[1:] if begins else row)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("row", COMMANDS)
def test_a_command_line_that_cannot_be_is_one_line(row, alone, capsys):
    (alone / "file").write_text("x")
    assert main(words_of(row)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"east_plugins: {COMMANDS[row]}") and said.count("\n") == 1
    assert [path.name for path in alone.iterdir()] == ["file"]


@pytest.mark.parametrize("content", CONFIGS)
def test_a_config_that_cannot_be_is_one_line(content, alone, capsys):
    (alone / "c.yaml").write_text(content)
    assert main("train --out new --config c.yaml".split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"east_plugins: {CONFIGS[content]}") and said.count("\n") == 1
    assert [path.name for path in alone.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("index", range(len(CALLS)))
def test_a_call_that_cannot_be_raises_one_line(index, alone):
    call, part = CALLS[index]
    with pytest.raises(EastError) as caught:
        call()
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not list(alone.iterdir())
