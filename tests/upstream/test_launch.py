"""`run`: a script in ITOP's manner, its hosts in the manner of all four published codebases, without one line of it
edited."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from east_plugins import __main__ as command_line
from east_plugins.commands.run import main
from east_plugins.errors import UsageError
from east_plugins.export.formats import to_onnx
from east_plugins.export.verify import run_onnx
from east_plugins.upstream import state

SCRIPT = str(Path(__file__).parent / "script" / "main.py")
ROOT = str(Path(__file__).parents[2])
HOSTS = ["itop", "sparse_learning", "granet", "rigl"]
MASKABLE = 3 * 8 * 9 + 6 * 8 * 8 * 9 + 8 * 4
BORROWED = 2 * 8 * 8 * 9
DENSITY = 0.08
# rigl-torch rounds every layer's zeros down by itself
TARGETS = {host: round(DENSITY * MASKABLE) for host in HOSTS} | {"rigl": 18 + 6 * 47 + 3}

pytestmark = [
    pytest.mark.usefixtures("elsewhere"),
    pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Seems like .optimizer.step"),
]


def run(capsys, *arguments, script=SCRIPT):
    """Exit code, what the script printed, and what the launcher said."""
    code = command_line.main(["run", script, *arguments])
    return code, *capsys.readouterr()


def number(pattern, text):
    return [float(found) for found in re.findall(pattern, text)]


def plainly(*arguments):
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    return done.returncode, done.stdout, done.stderr


# ------------------------------------------------------------------ running a script


def test_without_flags_the_script_prints_the_same_bit_for_bit():
    code, launched, _ = plainly("-W", "ignore", "-m", "east_plugins", "run", SCRIPT, "--sparse")
    assert (code, launched) == plainly("-W", "ignore", SCRIPT, "--sparse")[:2]
    assert launched.count("loss") == 40


@pytest.mark.parametrize("how", [["script.py"], ["--module", "script"]])
def test_arguments_folder_and_exit_code_are_the_scripts_own(tmp_path, how):
    lines = "import os, sys; print(sys.argv[1:], sys.path[0], __name__, os.path.abspath(__file__)); sys.exit(7)"
    Path("script.py").write_text(lines)
    code, out, _ = plainly("-m", "east_plugins", "run", *how, "a", "--b=1", "--", "--east-nothing")
    assert code == 7
    assert out.strip() == f"['a', '--b=1', '--', '--east-nothing'] {tmp_path} __main__ {tmp_path / 'script.py'}"


def test_classes_of_the_script_can_be_pickled_and_its_module_is_main(capsys):
    Path("s.py").write_text(
        "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A, A.__module__)\n"
    )
    assert run(capsys, script="s.py")[:2] == (0, "True __main__\n")


def test_a_word_before_east_compat_is_the_scripts(capsys):
    Path("s.py").write_text("import sys; print(sys.argv[1:])")
    given = ["cuda", "--east-compat", "--", "--east-compat", "cuda"]
    assert run(capsys, *given, script="s.py")[:2] == (0, "['cuda', '--', '--east-compat', 'cuda']\n")


def test_help_shows_the_scripts_own_and_easts_flags(capsys):
    with pytest.raises(SystemExit) as end:
        main([SCRIPT, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "A script in ITOP's manner" in shown and "--east-cyclic-multiplier" in shown and "--east-compat" in shown


def test_flags_are_recorded_in_the_scripts_namespace_only_if_given(capsys):
    assert "east" not in run(capsys, "--sparse", "--epochs", "1")[1]
    namespace = run(capsys, "--sparse", "--east-share", "--east-share-from=1")[1].splitlines()[0]
    assert "east_share=True" in namespace and "east_share_from=1" in namespace and "east_cyclic" not in namespace


def test_nothing_stays_replaced(capsys):
    import argparse

    before = argparse.ArgumentParser.parse_args, torch.optim.Optimizer.__init__, torch.nn.Module.__call__, sys.path[:]
    run(capsys, "--sparse", "--east")
    assert before == (
        argparse.ArgumentParser.parse_args, torch.optim.Optimizer.__init__, torch.nn.Module.__call__, sys.path[:]
    )  # fmt: skip


# ------------------------------------------------------------------ the tricks in the script's own host


@pytest.mark.parametrize("host", HOSTS)
def test_cycles_in_the_scripts_own_masks(capsys, host):
    code, out, said = run(capsys, "--sparse", "--host", host, "--east-cyclic", "--east-state", "state.pt")
    assert code == 0
    steps = {int(s): int(n) for s, n in re.findall(r"step (\d+): (\d+) active", said)}
    state = torch.load("state.pt")
    target = TARGETS[host]
    assert [steps[s] for s in (4, 8, 12, 16)] == [10 * target, target, 10 * target, target]
    assert all(count == target for step, count in steps.items() if step > 16)
    assert sum(int(mask.sum()) for mask in state["masks"].values()) == target
    assert all(mask.dtype == torch.bool for mask in state["masks"].values())
    fired = {name: int(mask.sum()) for name, mask in state["fired_masks"].items()}
    assert 10 * target <= sum(fired.values()) <= MASKABLE
    assert state["steps"] == 40
    # the script's weights follow the masks (those just grown are still zero)
    nonzero = [round(density * MASKABLE) for density in number(r"density (\S+)", out)]
    assert all(nonzero[step] <= count for step, count in steps.items())
    assert max(nonzero[4:7]) > 3 * target >= 3 * max(nonzero[17:])


@pytest.mark.parametrize("host", HOSTS)
def test_the_hosts_own_updates_are_kept_after_the_cycles(capsys, host):
    said = run(capsys, "--sparse", "--host", host, "--east-cyclic")[2]
    late = [step for step in map(int, re.findall(r"step (\d+): \d+ active", said)) if step > 16]
    every_four = [20, 24, 28, 32, 36, 40]
    assert late == {"sparse_learning": [20, 30], "rigl": [s for s in every_four if s < 30]}.get(host, every_four)


@pytest.mark.parametrize("host", [*HOSTS, "none"])
def test_activations_are_trained_and_gone_at_the_end(capsys, host):
    dense = [] if host == "none" else ["--sparse", "--host", host]
    plain, phased = run(capsys, *dense)[1], run(capsys, *dense, "--east-dyrelu")[1]
    assert plain.splitlines()[-1] == phased.splitlines()[-1]  # modules and parameters
    assert number(r"loss (\S+)", plain)[0] != number(r"loss (\S+)", phased)[0]
    assert "test:" in phased


@pytest.mark.parametrize("host", HOSTS)
def test_shared_weights_are_counted_in_the_unshared_network(capsys, host):
    code, out, said = run(capsys, "--sparse", "--host", host, "--east-share", "--east-state", "state.pt")
    masks = torch.load("state.pt")["masks"]
    assert code == 0 and f"{BORROWED:,} weights shared" in said
    assert sum(mask.numel() for mask in masks.values()) == MASKABLE - BORROWED
    assert not any("scale" in name or "layer1.2" in name for name in masks)
    active = sum(int(mask.sum()) for mask in masks.values())
    assert active == pytest.approx(DENSITY * MASKABLE, rel=0.3)  # the script's own draw and growth
    assert "parameters: 20" in out  # two weights less, two scales more


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("owner", ["script", "own"])
def test_all_tricks_together_and_a_strict_reload(capsys, host, owner):
    given = ["--sparse", "--host", host, "--east", "--east-host", owner, "--east-state", "state.pt"]
    code, out, said = run(capsys, *given)
    active = sum(int(mask.sum()) for mask in torch.load("state.pt")["masks"].values())
    assert code == 0
    exact = round(DENSITY * MASKABLE)
    assert active == exact if (host, owner) != ("rigl", "script") else exact <= active <= exact + 8
    assert number(r"test: \S+ density (\S+)", out)[0] <= active / (MASKABLE - BORROWED) + 1e-6
    assert run(capsys, *given)[1] == out  # deterministic


def test_a_run_of_the_same_seed_draws_the_scripts_own_numbers(capsys):
    """The order of the data and the first masks are those of the run without EAST."""
    without, cyclic = run(capsys, "--sparse")[1], run(capsys, "--sparse", "--east-cyclic")[1]
    assert number(r"loss (\S+)", without)[0] == number(r"loss (\S+)", cyclic)[0]
    assert number(r"density (\S+)", without)[0] == number(r"density (\S+)", cyclic)[0]


def test_an_epoch_milestone_ends_the_activations_just_before_it(capsys):
    assert "phased out between steps 10 and 20" in run(capsys, "--sparse", "--east-dyrelu")[2]  # MultiStepLR [2]
    given = ["--east-dyrelu-start", "1.5", "--east-dyrelu-end", "3"]
    assert "phased out between steps 15 and 30" in run(capsys, "--sparse", "--east-dyrelu", *given)[2]


def test_a_second_network_in_one_process_gets_its_own(capsys):
    said = run(capsys, "--sparse", "--east-dyrelu", "--iters", "2")[2]
    assert said.count("7 activations") == 2


# ------------------------------------------------------------------ what is tested at the end


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("flag", ["--east-cyclic", "--east-dyrelu", "--east"])
def test_a_best_checkpoint_from_before_does_not_count(capsys, host, flag):
    """The best epoch lies in a cycle and has DyReLU: the network of the end is tested, in both ways of keeping."""
    _, out, said = run(capsys, "--sparse", "--host", host, flag, "--first-is-best", "--seed", "3")
    assert re.findall(r"saving epoch (\d)", out) == ["0"]
    final, test, copied = (number(rf"{name}: (\S+)", out)[0] for name in ("final", "test", "copy"))
    assert final == test == copied
    assert number(r"final: \S+ density (\S+)", out) == number(r"test: \S+ density (\S+)", out)
    assert "checkpoint of step 10 is of an unfinished network" in said and "copy of an unfinished network" in said
    assert ("target density" in said, "plain ReLUs" in said) == (flag != "--east-dyrelu", flag != "--east-cyclic")


def test_a_best_checkpoint_of_the_finished_network_counts(capsys):
    _, out, said = run(capsys, "--sparse", "--east-share", "--first-is-best")
    assert "checkpoint of step" not in said
    assert number(r"test: (\S+)", out) == number(r"copy: (\S+)", out)
    assert number(r"final: \S+ density (\S+)", out) != number(r"test: \S+ density (\S+)", out)
    assert "east" not in "".join(torch.load("best.pt"))


BETA = r"activations at beta 0\.67 \(plain ReLUs at 0\)"


@pytest.mark.parametrize(
    ("host", "tricks", "left"),
    [
        *((host, ["cyclic"], r"density 0\.\d+ inside a cycle \(target 0\.08\)") for host in HOSTS[:3]),  # rigl refuses
        ("itop", ["dyrelu"], BETA),
        ("none", ["dyrelu"], BETA),
        ("itop", ["cyclic", "dyrelu"], rf"density 0\.\d+ inside a cycle \(target 0\.08\) and {BETA}"),
    ],
)
def test_a_script_that_ends_before_its_time_is_told(capsys, host, tricks, left):
    sparse = [] if host == "none" else ["--sparse", "--host", host]
    given = [*sparse, *(f"--east-{trick}" for trick in tricks)]
    assert "the script ended" not in run(capsys, *given)[2]
    phase = ["--east-dyrelu-start", "1", "--east-dyrelu-end", "4"] if "dyrelu" in tricks else []
    code, _, said = run(capsys, *given, *phase, "--epochs", "2", "--east-epochs", "10")
    told = [line for line in said.splitlines() if "the script ended" in line]
    assert code == 0 and len(told) == 1
    assert re.search(f"the script ended at step 20 of 100 with {left}; check --east-epochs$", told[0])


# ------------------------------------------------------------------ the state that is saved


def test_the_state_is_saved_where_it_was_asked_for_and_on_ctrl_c(capsys, tmp_path):
    lines = OWN.format(host="import os; from east_plugins import CosineDecay, Masking")
    step = "        print(mask.steps"
    assert step in lines
    stop = "        os.chdir('/')\n        if mask.steps == 6: raise KeyboardInterrupt\n"
    Path("s.py").write_text(lines.replace(step, stop + step))
    code, out, _ = run(capsys, "--east-cyclic", "--east-state", "state.pt", script="s.py")
    assert code == 130 and len(out.splitlines()) == 5
    assert torch.load(tmp_path / "state.pt")["steps"] == 6


def stopped(how, file="s.py"):
    """A script that ends by `how` in step 6, in another folder."""
    lines = OWN.format(host="import os, signal; from east_plugins import CosineDecay, Masking")
    step = "        print(mask.steps"
    assert step in lines
    Path(file).write_text(lines.replace(step, f"        os.chdir('/')\n        if mask.steps == 6: {how}\n" + step))


@pytest.mark.parametrize(
    ("how", "end"),
    [
        ("1 / 0", ZeroDivisionError),
        ("raise SystemExit(3)", SystemExit),
        ("os.kill(os.getpid(), signal.SIGTERM)", SystemExit),
        ("os.kill(os.getpid(), signal.SIGHUP)", SystemExit),
    ],
)
def test_the_state_is_saved_when_the_script_dies(capsys, tmp_path, how, end):
    before = [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)]  # nohup ignores one
    stopped(how)
    try:
        with pytest.raises(end) as raised:
            run(capsys, "--east-cyclic", "--east-state", "state.pt", script="s.py")
        assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_DFL}
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)
    if end is SystemExit:
        assert raised.value.code in (3, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert torch.load(tmp_path / "state.pt")["steps"] == 6
    assert [path.name for path in tmp_path.glob("state*")] == ["state.pt"]


def test_a_patched_script_saves_its_state_when_it_is_killed(tmp_path):
    stopped("os.kill(os.getpid(), signal.SIGTERM)")
    lines = Path("s.py").read_text()
    Path("s.py").write_text(
        "import argparse\nfrom east_plugins import launch as east\nparser = argparse.ArgumentParser()\n"
        "east.add_flags(parser)\neast.activate(parser.parse_args())\n" + lines
    )
    assert plainly("s.py", "--east-cyclic", "--east-state", "state.pt")[0] == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "state.pt")["steps"] == 6


def test_the_state_of_before_stands_where_the_new_one_cannot_be_written(capsys, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    assert run(capsys, "--sparse", "--epochs", "1", "--east-share", "--east-state", "state.pt")[0] == 0
    before = Path("state.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    code, _, said = run(capsys, "--sparse", "--east-share", "--east-state", "state.pt")
    assert code == 2 and said.splitlines()[-1].endswith("state.pt cannot be written: No space left on device")
    assert Path("state.pt").read_bytes() == before
    assert [path.name for path in tmp_path.glob("state*")] == ["state.pt"]


@pytest.mark.parametrize("owner", ["script", "own"])
@pytest.mark.parametrize("flag", ["--east-share", "--east"])
def test_the_network_is_in_the_state_and_exports_like_a_runs(capsys, monkeypatch, owner, flag):
    code, out, _ = run(capsys, "--sparse", flag, "--east-host", owner, "--east-state", "state.pt")
    assert code == 0
    saved = state.read("state.pt")
    assert saved.finished and saved.input_shape == (3, 6, 6) and saved.network_class == "__main__:Net"
    values = sum(value.numel() for name, value in saved.values.items() if name in saved.masks)
    assert values == sum(int(mask.sum()) for mask in saved.masks.values())
    script = runpy.run_path(SCRIPT)
    model = saved.network(script["Net"](8, 3))
    shown = script["accuracy"](model, torch.utils.data.DataLoader(script["data"](16, 3), batch_size=16))
    assert number(r"final: (\S+)", out) == [round(shown, 6)]
    for name, weight in model.named_parameters():
        assert name not in saved.masks or not weight[~saved.masks[name]].any()
    monkeypatch.setattr(torch.nn.functional, "log_softmax", lambda x, dim: x)  # which no export has
    content = to_onnx(model, saved.masks, saved.input_shape)
    inputs = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(torch.from_numpy(run_onnx(content)(inputs.numpy())), model(inputs).detach())
    with pytest.raises(UsageError, match="does not fit this Net; what differs: "):
        saved.network(script["Net"](16, 3))


@pytest.mark.parametrize("kind", ["c", "onnx", "safetensors"])
def test_export_takes_the_state_of_a_script(capsys, kind):
    Path("east_test_module.py").write_text(
        "from torch import nn\ndef network(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    Path("s.py").write_text(OWN.format(host="from east_plugins import CosineDecay, Masking"))
    assert run(capsys, "--east-cyclic", "--east-dyrelu", "--east-state", "state.pt", script="s.py")[0] == 0
    given = ["export", "state.pt", "--format", kind, "--out", f"net.{kind}"]
    assert command_line.main(given) == 2
    assert "--network module:function must make its torch.nn.modules.container:Sequential" in capsys.readouterr().err
    assert command_line.main([*given, "--network", "east_test_module:nothing"]) == 2
    assert "cannot be built: AttributeError" in capsys.readouterr().err
    assert command_line.main([*given, "--network", "east_test_module:network"]) == 0
    assert "14 active weights" in capsys.readouterr().out and Path(f"net.{kind}").stat().st_size


def test_analyze_takes_states_of_scripts(capsys):
    Path("east_test_module.py").write_text(
        "from torch import nn\ndef network(): return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))\n"
    )
    Path("s.py").write_text(OWN.format(host="from east_plugins import CosineDecay, Masking"))
    for flag, file in (("--east-cyclic", "a.pt"), ("--east-dyrelu", "b.pt")):
        assert run(capsys, flag, "--east-state", file, script="s.py")[0] == 0
    saved = state.read("a.pt")
    for network in ([], ["--network", "east_test_module:network"]):
        assert command_line.main(["analyze", "a.pt", "b.pt", "--json", *network]) == 0
        report = json.loads(capsys.readouterr().out)
        first, second = report["runs"]
        assert (first["nonzeros"], second["nonzeros"], first["density"]) == (14, 14, 14 / 144)
        assert first["itop_rate"] == sum(int(mask.sum()) for mask in saved.fired_masks.values()) / 144
        assert (first["effective_density"] is None) == (network == [])
        assert report["jaccard"][0][0] == 1 > report["jaccard"][0][1]
        assert command_line.main(["analyze", "a.pt", "--layers", *network]) == 0
        shown = capsys.readouterr().out
        assert "2.weight" in shown and ("--network" in shown) == (network == [])


def test_an_unfinished_network_and_a_file_of_something_else_are_refused(capsys):
    run(capsys, "--sparse", "--epochs", "2", "--east-epochs", "10", "--east-cyclic", "--east-state", "state.pt")
    with pytest.raises(UsageError, match="the network of step 20 is unfinished"):
        state.read("state.pt").network(torch.nn.Linear(1, 1))
    torch.save({"masks": {}}, "other.pt")
    Path("text.pt").write_text("nothing")
    for file in ("other.pt", "text.pt", "missing.pt"):
        with pytest.raises(UsageError, match=rf"^{file} (holds no|is neither)"):
            state.read(file)


@pytest.mark.parametrize("file", ["nowhere/state.pt", ".", ""])
def test_a_state_that_cannot_be_written_is_refused_before_the_script_starts(capsys, file):
    code, out, said = run(capsys, "--sparse", "--east-share", f"--east-state={file}")
    assert (code, out) == (2, "") and len(said.splitlines()) == 1
    assert f"--east-state {file!r} cannot be written; allowed is" in said


# ------------------------------------------------------------------ refusals, before training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "unknown", "--sparse", "--east-dyrelu"], r"Masking\(optimizer, sparsity\) is a host of an unknown"),
        (["--east-cyclic"], "--east-cyclic needs a host of masks"),
        (["--sparse", "--blocks", "1", "--east-share"], "--east-share needs a stage with a block equal"),
        (["--sparse", "--east-cyclic", "--east-cyclic-length", "3"], "--east-cyclic-length: 2 cycles close"),
        (["--sparse", "--east-cyclic", "--east-cyclic-length", "1e308"], "--east-cyclic-length must be .* got 1e.308"),
        *(
            (["--sparse", "--east-cyclic", "--east-cyclic-length-mult", x, "--east-cyclic-cycles", "4"], message)
            for x, message in (
                ("1e200", "--east-cyclic-length-mult 1e.200: 4 such cycles never close; allowed"),
                ("1e90", r"4 cycles close at step [\d.]+e.270; allowed"),
            )
        ),
        (["--sparse", "--host", "rigl", "--east-cyclic", "--east-cyclic-length", "1.6"], "last step, 30"),
        (["--sparse", "--east-dyrelu", "--east-dyrelu-end", "9"], "--east-dyrelu-end 9 lies after the last of 4"),
        (["--sparse", "--east-cyclic-length", "1"], "--east-cyclic-length needs --east-cyclic"),
        *((["--sparse", "--east-cyclic", f"--east-epochs={x}"], "--east-epochs must") for x in (-1, 0, "nan", "inf")),
        *((["--sparse", "--east-cyclic", f"--east-steps-per-epoch={n}"], "--east-steps-per-epoch m") for n in (0, -3)),
        (["--sparse", "--east-cylcic"], "--east-cylcic"),
        (["--sparse", "--east-host", "mine"], "--east-host"),
        (["--east-compat", "cuda", "--sparse"], "--east-compat cuda: write --east-compat=cuda, or"),
        (["--sparse", "--east-compat", "data,path"], "write --east-compat=data,path"),
        (["--sparse", "--east-compat=nimpy"], "did you mean numpy"),
    ],
)
def test_refused_in_one_line_before_training(capsys, arguments, message):
    code, out, said = run(capsys, *arguments)
    said = [line for line in said.splitlines() if not line.startswith("east_plugins: attached")]
    assert code == 2 and len(said) == 1 and re.search(message, said[0])
    assert "loss" not in out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "trained no model of a known host"),
        ("import sys; sys.exit()", "trained no model of a known host"),
        (
            "from torch import nn, ones, optim; m = nn.Linear(2, 2); o = optim.SGD(m.parameters()); m(ones(2)); 1 / 0",
            "no known host",
        ),
    ],
)
def test_a_script_without_a_known_host_is_refused(capsys, lines, message):
    Path("s.py").write_text(lines)
    code, out, said = run(capsys, "--east-dyrelu", script="s.py")
    assert (code, out) == (2, "") and message in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cyclic_multiplier: abc", "cyclic-multiplier: invalid float value: 'abc'"),
        ("cyclic-cycles: 1.5", "cyclic-cycles: invalid int value: '1.5'"),
        ("cyclic_length: [1, 2]", "cyclic-length: invalid float value: '1,2'"),
        ("cyclic_length: true", "--east-config e.yaml: cyclic_length must be a number, got true"),
        ("dyrelu_end: abc", "dyrelu-end: invalid float value: 'abc'"),
        ("cyclic_pattern: saw", "cyclic-pattern: invalid choice: 'saw'"),
        ("dyrelu: 'false'", "dyrelu must be true or false, got 'false'"),
        ("share: 1", "share must be true or false, got 1"),
        ("cylcic: true", "did you mean cyclic"),
    ],
)
def test_a_config_file_is_read_as_flags_are(capsys, line, message):
    Path("e.yaml").write_text(f"cyclic: true\neast-dyrelu: true\n{line}\n")
    code, out, said = run(capsys, "--sparse", "--east-config", "e.yaml")
    assert (code, out) == (2, "") and len(said.splitlines()) == 1
    assert "e.yaml" in said and message in said


def test_false_in_a_config_file_switches_off_and_flags_go_before_it(capsys):
    Path("e.yaml").write_text("cyclic: false\nshare: true\nshare-from: 1\ncyclic-length: null\n")
    said = run(capsys, "--sparse", "--east", "--east-config", "e.yaml")[2]
    assert "activations" in said and "in cycles" not in said and "2,304 weights shared" in said
    assert "in cycles" in run(capsys, "--sparse", "--east-cyclic", "--east-config", "e.yaml", "--epochs", "4")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--east-dyrelu-type", "foo"], "--east-dyrelu-type: unknown activation 'foo'"),
        (["--east-dyrelu-type", "no_such_module:act"], "activation 'no_such_module:act' cannot be imported"),
        (["--east-dyrelu-type", "swish", "--east-dyrelu-reduction", "2"], "activation 'swish' (--east-dyrelu-type)"),
    ],
)
def test_an_unknown_activation_is_refused_before_the_script_starts(capsys, arguments, message):
    code, out, said = run(capsys, "--sparse", "--east-dyrelu", *arguments)
    assert (code, out) == (2, "") and len(said.splitlines()) == 1 and message in said


def test_an_activation_of_the_script_or_beside_it_is_found(capsys):
    factory = "def act(channels): return torch.nn.PReLU(channels)\n"
    Path("east_test_module.py").write_text("import torch\n" + factory)
    Path("s.py").write_text(OWN.format(host=factory + "from east_plugins import CosineDecay, Masking"))
    for module in ("__main__", "east_test_module"):
        code, _, said = run(capsys, "--east-dyrelu", f"--east-dyrelu-type={module}:act", script="s.py")
        assert code == 0 and "1 activations" in said


@pytest.mark.parametrize("arguments", [[], ["--module"], ["missing.py"], ["--sparse", SCRIPT]])
def test_a_missing_script_is_refused(capsys, arguments):
    assert command_line.main(["run", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------ our host

OWN = """
import torch
from torch.utils.data import DataLoader, TensorDataset
{host}
loader = DataLoader(TensorDataset(torch.randn(20, 6), torch.randn(20, 3)), 4, shuffle=True)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mask = Masking(optimizer, death_rate_decay=CosineDecay(0.5, 40), growth_mode="gradient", redistribution_mode="none")
mask.add_module(model, density=0.1)
for epoch in range(8):
    for x, y in loader:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        mask.step()
        print(mask.steps, mask.nonzeros)
print(type(mask).__name__, type(model[1]).__name__, len(list(model.parameters())))
"""


@pytest.mark.parametrize(
    "host", ["from east_plugins import CosineDecay, Masking", "from sparselearning.core import CosineDecay, Masking"]
)
def test_our_host_imported_or_lent_as_sparselearning(capsys, host):
    Path("s.py").write_text(OWN.format(host=host))
    code, out, said = run(capsys, "--east-cyclic", "--east-dyrelu", script="s.py")
    counts = dict(line.split() for line in out.splitlines()[:-1])
    assert code == 0
    assert (counts["4"], counts["8"], counts["40"]) == ("144", "14", "14")  # all weights where the density is 1
    assert out.splitlines()[-1] == "Masking ReLU 4"
    assert ("lending" in said) == ("sparselearning" in host)


def test_a_host_of_its_own_goes_before_the_lent_one(capsys):
    assert "lending" not in run(capsys, "--sparse", "--epochs", "1")[2]


@pytest.mark.parametrize("host", HOSTS)
def test_our_host_in_place_of_the_scripts(capsys, host):
    code, out, said = run(capsys, "--sparse", "--host", host, "--east-host", "own", "--east-state", "state.pt")
    masks = torch.load("state.pt")["masks"]
    assert code == 0 and "east_plugins host" in said and "test:" in out
    assert sum(int(mask.sum()) for mask in masks.values()) == round(DENSITY * MASKABLE)


# ------------------------------------------------------------------ the flags in the script's source

PATCHED = (
    ("from sparselearning.core import CosineDecay, Masking\n", "from east_plugins import launch as east\n"),
    ("    sparselearning.core.add_sparse_args(parser)\n", "    east.add_flags(parser)\n"),
    ("    args = parser.parse_args()\n", "    east.activate(args)\n"),
)


@pytest.fixture
def patched(tmp_path):
    """The script with the flags in its source, `main.py` in the working folder."""
    for name in ("main.py", "others.py", "sparselearning/__init__.py", "sparselearning/core.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text((Path(SCRIPT).parent / name).read_text())
    source = (tmp_path / "main.py").read_text()
    for line, added in PATCHED:
        assert source.count(line) == 1
        source = source.replace(line, line + added)
    (tmp_path / "main.py").write_text(source)


@pytest.mark.parametrize("host", ["itop", "rigl"])
@pytest.mark.usefixtures("patched")
def test_patched_and_launched_runs_give_the_same_masks(capsys, host):
    given = ["--sparse", "--host", host, "--east", "--east-state"]
    code, out, _ = plainly("-W", "ignore", "main.py", *given, "patched.pt")
    assert code == 0
    assert run(capsys, *given, "launched.pt")[1].splitlines()[1:] == out.splitlines()[1:]
    patched, launched = torch.load("patched.pt"), torch.load("launched.pt")
    for kind in ("masks", "fired_masks"):
        assert patched[kind].keys() == launched[kind].keys()
        assert all(torch.equal(mask, launched[kind][name]) for name, mask in patched[kind].items())
    code, out, error = plainly("main.py", "--sparse", "--east-cyclic-length", "1")
    assert (code, error) == (2, "east_plugins: --east-cyclic-length needs --east-cyclic\n")


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.usefixtures("patched")
def test_a_patched_script_can_be_launched_too(capsys, host):
    """EAST is attached once, by `run`: same numbers as the unpatched script."""
    given = ["--sparse", "--host", host, "--east"]
    code, out, said = run(capsys, *given, script="main.py")
    assert code == 0 and said.count("attached to") == 1
    assert out == run(capsys, *given)[1]
