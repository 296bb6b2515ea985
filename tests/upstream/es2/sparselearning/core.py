"""A small host in the manner of ES2's: ITOP's signatures, masks that leave out DyReLU and scales by name, an allocation
with a floor, and cycles that only grow or only prune."""

import math

import torch
from torch import nn


def add_sparse_args(parser):
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--fix", action="store_true")
    parser.add_argument("--growth", default="gradient")
    parser.add_argument("--death-rate", type=float, default=0.5)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--update_frequency", type=int, default=4)


class CosineDecay:
    def __init__(self, death_rate, T_max, eta_min=0.005):
        self.sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=death_rate)
        self.cosine_stepper = torch.optim.lr_scheduler.CosineAnnealingLR(self.sgd, T_max, eta_min)

    def step(self):
        self.cosine_stepper.step()

    def get_dr(self):
        return self.sgd.param_groups[0]["lr"]


class Masking:
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
        self.optimizer, self.args, self.masks, self.modules, self.steps = optimizer, args, {}, [], 0
        self.death_rate, self.death_rate_decay = death_rate, death_rate_decay
        self.death_mode, self.growth_mode = death_mode, growth_mode
        self.prune_every_k_steps = None if args.fix else args.update_frequency
        self.cyclic_end_step, self.steps_per_cycle, self.current_cycle = 0, [], 0

    def add_module(self, module, density, sparse_init="ER"):
        self.modules.append(module)
        self.density = density
        norms = {id(p) for m in module.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        for name, weight in module.named_parameters():
            if not any(word in name for word in ("relu", "scale", "bias")) and id(weight) not in norms:
                self.masks[name] = torch.zeros_like(weight)
        for name, wanted in self.counts(density, round).items():
            self.masks[name].view(-1)[torch.randperm(self.masks[name].numel())[:wanted]] = 1
        self.apply_mask()
        self.fired_masks = {name: mask.clone() for name, mask in self.masks.items()}

    def counts(self, density, whole):
        """Active weights of every layer; nothing is given back for a floor or a full layer."""
        sizes = {name: mask.numel() for name, mask in self.masks.items()}
        raw = {name: sum(mask.shape) / mask.numel() for name, mask in self.masks.items()}
        scale = int(density * sum(sizes.values())) / sum(raw[name] * sizes[name] for name in raw)
        share = {name: min(1.0, max(0.1 * density, scale * raw[name])) for name in raw}
        return {name: whole(share[name] * sizes[name]) for name in raw}

    def named(self):
        return [(n, w) for module in self.modules for n, w in module.named_parameters() if n in self.masks]

    def apply_mask(self):
        for name, weight in self.named():
            weight.data = weight.data * self.masks[name]
            state = self.optimizer.state[weight]
            if "momentum_buffer" in state:
                state["momentum_buffer"] = state["momentum_buffer"] * self.masks[name]

    def step(self):
        self.optimizer.step()
        self.apply_mask()
        self.death_rate_decay.step()
        self.death_rate = self.death_rate_decay.get_dr()
        self.steps += 1
        if self.prune_every_k_steps is None or self.steps % self.prune_every_k_steps:
            return
        if self.args.cyclic and self.steps <= self.cyclic_end_step:
            self.current_cycle += self.steps > sum(self.steps_per_cycle[: self.current_cycle + 1])
            before = sum(self.steps_per_cycle[: self.current_cycle])
            phase = (self.steps - 1 - before) / self.steps_per_cycle[self.current_cycle]
            swing = (
                1 - abs(2 * phase - 1) if self.args.cyclic_pattern == "triangular" else math.sin(phase * math.pi) ** 2
            )
            self.next_density = self.density * (1 + (self.args.density_max_multiplier - 1) * swing)
            self.prune_regrow()
        else:
            if self.args.cyclic:
                self.prune_every_k_steps = 8
            self.truncate_weights()

    def prune_regrow(self):
        for name, wanted in self.counts(self.next_density, int).items():
            mask, weight = self.masks[name], dict(self.named())[name]
            active = int(mask.sum())
            if wanted < active:
                mask.view(-1)[(weight.abs() + mask).view(-1).argsort()[: mask.numel() - wanted]] = 0
            elif wanted > active:
                score = (weight.grad.abs() * (mask == 0)).view(-1)
                mask.view(-1)[score.argsort(descending=True)[: wanted - active]] = 1
        self.apply_mask()

    def truncate_weights(self):
        for name, weight in self.named():
            mask = self.masks[name]
            gone = math.ceil(self.death_rate * int(mask.sum()))
            kept = mask.clone()
            kept.view(-1)[(weight.abs() + mask).view(-1).argsort()[: mask.numel() - int(mask.sum()) + gone]] = 0
            score = (weight.grad.abs() * (kept == 0)).view(-1)
            kept.view(-1)[score.argsort(descending=True)[:gone]] = 1
            self.masks[name] = kept
        self.apply_mask()

    def get_metrics(self):
        active, size = sum(int(m.sum()) for m in self.masks.values()), sum(m.numel() for m in self.masks.values())
        return {"overall_density": active / size, "active_normal_params": active, "normal_params": size}
