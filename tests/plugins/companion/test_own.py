import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from east_plugins import Masking
from east_plugins.errors import UsageError

MODULE = '''
from dataclasses import dataclass, field
from east_plugins import option

@dataclass
class Diary:
    """Notes what it is called for."""

    steps: int
    every: int = option(1, "steps between notes", type=int)
    notes: list = field(default_factory=list, init=False)

    def begin(self, host):
        self.notes.append(("begin", host.steps, host.nonzeros))

    def before(self, host):
        self.notes.append(("before", host.steps, sum(int((w.grad != 0).sum()) for w in host.weights.values())))

    def __call__(self, host):
        if host.steps % self.every == 0:
            self.notes.append(("after", host.steps, host.nonzeros))

    def state_dict(self):
        return {"notes": list(self.notes)}

    def load_state_dict(self, state):
        self.notes = state["notes"]
'''


@pytest.fixture
def diary(tmp_path, monkeypatch):
    (tmp_path / "my_diary.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_diary:Diary"


def hosted(diary, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Masking.of("rigl", model, optimizer, density=0.25, steps=9, companion=diary, update_frequency=2, **settings)


def step(host):
    host.optimizer.zero_grad()
    F.cross_entropy(host.modules[0](torch.ones(4, 8)), torch.zeros(4, dtype=torch.long)).backward()
    host.step()


def test_a_companion_of_ones_own_is_called_around_every_step_and_saved_with_the_host(diary):
    host = hosted(diary, companion_every=2)
    (own,) = host.plugins
    assert (own.steps, own.every) == (9, 2)
    for _ in range(3):
        step(host)
    assert [note[:2] for note in own.notes] == [
        ("begin", 0), ("before", 0), ("before", 1), ("after", 2), ("before", 2)
    ]  # fmt: skip
    assert own.notes[0][2] == host.nonzeros
    assert own.notes[1][2] > host.nonzeros  # dense gradients, before they are masked
    again = hosted(diary)
    again.load_state_dict(copy.deepcopy(host.state_dict()))
    assert again.plugins[0].notes == own.notes


def test_it_is_called_where_the_script_steps_the_optimizer_itself(diary):
    host = hosted(diary)
    host.optimizer.zero_grad()
    F.cross_entropy(host.modules[0](torch.ones(4, 8)), torch.zeros(4, dtype=torch.long)).backward()
    host.optimizer.step()
    assert [note[0] for note in host.plugins[0].notes] == ["begin", "before", "after"]


def test_what_cannot_be_is_one_line(diary):
    with pytest.raises(UsageError, match="`companion_evry` is no option of `companion` my_diary:Diary"):
        hosted(diary, companion_evry=2)
    with pytest.raises(UsageError, match="`companion`: unknown companion 'topcast'; did you mean topkast"):
        hosted("topcast")
