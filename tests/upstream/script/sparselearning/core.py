"""A small host in the manner of ITOP's: its names and signatures, float masks by name that every update replaces,
pruning by a threshold that ties pass or fail together, random growth that hits its number only on average."""

import torch
from torch import nn


def add_sparse_args(parser):
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("--growth", default="gradient")
    parser.add_argument("--death-rate", type=float, default=0.5)
    parser.add_argument("--density", type=float, default=0.08)
    parser.add_argument("--update_frequency", type=int, default=4)


class CosineDecay:
    def __init__(self, death_rate, T_max, eta_min=0.005):
        self.sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=death_rate)
        self.cosine_stepper = torch.optim.lr_scheduler.CosineAnnealingLR(self.sgd, T_max, eta_min)

    def step(self):
        self.cosine_stepper.step()

    def get_dr(self):
        return self.sgd.param_groups[0]["lr"]


class Masks:
    """What the three hosts of this family have in common."""

    def __init__(self, optimizer):
        self.optimizer, self.masks, self.modules, self.steps = optimizer, {}, [], 0

    def draw(self, module, density):
        self.modules.append(module)
        norms = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        for name, weight in module.named_parameters():
            if "bias" not in name and id(weight) not in norms:  # parameters of any other kind get a mask too
                small = weight.numel() < 50
                self.masks[name] = (torch.rand(weight.shape) < (0.5 if small else density)).float()
        self.apply_mask()

    def named(self):
        return [(n, w) for module in self.modules for n, w in module.named_parameters() if n in self.masks]

    def apply_mask(self):
        for name, weight in self.named():
            weight.data = weight.data * self.masks[name]
            state = self.optimizer.state[weight]
            if "momentum_buffer" in state:
                state["momentum_buffer"] = state["momentum_buffer"] * self.masks[name]

    def update(self, rate, growth):
        for name, weight in self.named():
            active = int(self.masks[name].sum())
            size = weight.data.abs().flatten()
            cut = size.sort().values[size.numel() - active + int(rate * active) - 1] if int(rate * active) else -1
            kept = (size.view_as(weight) > cut) & self.masks[name].bool()
            wanted = active - int(kept.sum())
            if growth == "random":
                grown = torch.rand(weight.shape) < wanted / max(1, int((~kept).sum()))
            else:
                score = (weight.grad.abs() * ~kept).flatten()
                grown = torch.zeros_like(kept)
                grown.view(-1)[score.sort(descending=True).indices[:wanted]] = True
            self.masks.pop(name)
            self.masks[name] = (kept | grown).float()
        self.apply_mask()

    def counts(self):
        return sum(int(mask.sum()) for mask in self.masks.values())


class Masking(Masks):
    def __init__(
        self,
        optimizer,
        death_rate=0.3,
        growth_death_ratio=1.0,
        death_rate_decay=None,
        death_mode="magnitude",
        growth_mode="momentum",
        redistribution_mode="momentum",
        threshold=0.001,
        args=None,
    ):
        super().__init__(optimizer)
        self.death_rate, self.death_rate_decay = death_rate, death_rate_decay
        self.death_mode, self.growth_mode = death_mode, growth_mode
        self.prune_every_k_steps = None if args.fix else args.update_frequency

    def add_module(self, module, density, sparse_init="ER"):
        self.density = density
        self.draw(module, density)
        self.fired_masks = {name: mask.clone() for name, mask in self.masks.items()}

    def step(self):
        self.optimizer.step()
        self.apply_mask()
        self.death_rate_decay.step()
        self.death_rate = self.death_rate_decay.get_dr()
        self.steps += 1
        if self.prune_every_k_steps is not None and self.steps % self.prune_every_k_steps == 0:
            self.truncate_weights()
            self.fired_masks_update()

    def truncate_weights(self):
        self.update(self.death_rate, self.growth_mode)

    def fired_masks_update(self):
        for name, mask in self.masks.items():
            self.fired_masks[name] = ((mask + self.fired_masks[name]) > 0).float()
