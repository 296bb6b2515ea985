"""Small hosts in the manner of sparse_learning, GraNet and rigl-torch."""

import torch
from sparselearning.core import CosineDecay, Masks
from torch import nn


class Decay(CosineDecay):
    def get_dr(self, prune_rate):
        return super().get_dr()


def sparse_learning():
    class Masking(Masks):
        def __init__(
            self,
            optimizer,
            prune_rate_decay,
            prune_rate=0.5,
            prune_mode="magnitude",
            growth_mode="momentum",
            redistribution_mode="momentum",
            prune_every_k_steps=0,
            verbose=False,
            fp16=False,
        ):
            super().__init__(optimizer)
            self.prune_rate_decay, self.prune_rate = prune_rate_decay, prune_rate
            self.prune_mode, self.growth_mode = prune_mode, growth_mode
            self.prune_every_k_steps = prune_every_k_steps
            self.adjustments, self.adjusted_growth = [], 0

        def add_module(self, module, density, sparse_init="constant"):
            self.draw(module, density)
            self.baseline_nonzero = density * sum(mask.numel() for mask in self.masks.values())

        def step(self):
            self.optimizer.step()
            self.apply_mask()
            self.prune_rate_decay.step()
            self.prune_rate = self.prune_rate_decay.get_dr(self.prune_rate)
            self.steps += 1
            if self.prune_every_k_steps and self.steps % self.prune_every_k_steps == 0:
                self.truncate_weights()

        def at_end_of_epoch(self):
            self.truncate_weights()

        def truncate_weights(self):
            self.update(self.prune_rate, "random")
            self.adjustments.append(self.baseline_nonzero - self.counts())

    return Masking


def granet():
    class Masking(Masks):
        def __init__(
            self,
            optimizer,
            prune_rate=0.3,
            growth_death_ratio=1.0,
            prune_rate_decay=None,
            death_mode="magnitude",
            growth_mode="momentum",
            redistribution_mode="momentum",
            threshold=0.001,
            args=None,
            train_loader=None,
            device=None,
        ):
            super().__init__(optimizer)
            self.args, self.loader = args, train_loader
            self.prune_rate_decay, self.prune_rate = prune_rate_decay, prune_rate
            self.prune_every_k_steps = args.update_frequency

        def add_module(self, module, sparse_init="ERK"):
            self.draw(module, self.args.init_density)

        def step(self):
            self.optimizer.step()
            self.apply_mask()
            self.prune_rate_decay.step()
            self.prune_rate = self.prune_rate_decay.get_dr()
            self.steps += 1
            if self.prune_every_k_steps is not None and self.steps % self.prune_every_k_steps == 0:
                self.truncate_weights(self.steps)

        def truncate_weights(self, step=None):
            self.update(self.prune_rate, "gradient")

    return Masking


def unknown():
    class Masking(Masks):
        def __init__(self, optimizer, sparsity):
            super().__init__(optimizer)

    return Masking


def get_W(model, return_linear_layers_mask=False):
    layers = [m for _, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = [m.weight for m in layers]  # a tied weight as often as it is used
    return (weights, [type(m) is nn.Linear for m in layers]) if return_linear_layers_mask else weights


class RigLScheduler:
    def __init__(
        self,
        model,
        optimizer,
        dense_allocation=1,
        T_end=None,
        sparsity_distribution="uniform",
        ignore_linear_layers=True,
        delta=100,
        alpha=0.3,
        static_topo=False,
        grad_accumulation_n=1,
        state_dict=None,
    ):
        self.model, self.optimizer = model, optimizer
        self.W, linear = get_W(model, return_linear_layers_mask=True)
        if len({id(w) for w in self.W}) < len(self.W):
            raise Exception("This model already has been registered to a RigLScheduler.")
        self.dense_allocation, self.T_end, self.delta_T, self.alpha = dense_allocation, T_end, delta, alpha
        self.step, self.rigl_steps = 0, 0
        self.backward_masks, self.backward_hook_objects = [], []
        for w in self.W:
            mask = torch.ones(w.numel(), dtype=torch.bool)
            mask[torch.randperm(w.numel())[: int((1 - dense_allocation) * w.numel())]] = False
            self.backward_masks.append(mask.view_as(w))
            self.backward_hook_objects.append(Hook(self, len(self.backward_masks) - 1))
            w.register_hook(self.backward_hook_objects[-1])
        self.apply_mask_to_weights()
        step = optimizer.step

        def wrapped():
            step()
            self.reset_momentum()
            self.apply_mask_to_weights()

        optimizer.step = wrapped

    def check_if_backward_hook_should_accumulate_grad(self):
        return self.step < self.T_end and self.delta_T - self.step % self.delta_T <= 1

    @torch.no_grad()
    def apply_mask_to_weights(self):
        for w, mask in zip(self.W, self.backward_masks, strict=True):
            w *= mask

    @torch.no_grad()
    def reset_momentum(self):
        for w, mask in zip(self.W, self.backward_masks, strict=True):
            if "momentum_buffer" in self.optimizer.state[w]:
                self.optimizer.state[w]["momentum_buffer"] *= mask

    def __call__(self):
        self.step += 1
        if self.step % self.delta_T == 0 and self.step < self.T_end:
            self._rigl_step()
            self.rigl_steps += 1
            return False
        return True

    @torch.no_grad()
    def _rigl_step(self):
        rate = self.alpha / 2 * (1 + torch.cos(torch.tensor(self.step * torch.pi / self.T_end)))
        for w, mask, hook in zip(self.W, self.backward_masks, self.backward_hook_objects, strict=True):
            active = int(mask.sum())
            kept = (w.abs() + mask).flatten().topk(active - int(rate * active)).indices
            fresh = torch.zeros(w.numel(), dtype=torch.bool)
            fresh[kept] = True
            score = hook.dense_grad.abs().flatten().masked_fill(fresh, -1)
            fresh[score.topk(active - len(kept)).indices] = True
            mask.data = fresh.view_as(w)
        self.reset_momentum()
        self.apply_mask_to_weights()


class Hook:
    def __init__(self, scheduler, layer):
        self.scheduler, self.layer, self.dense_grad = scheduler, layer, None

    @torch.no_grad()
    def __call__(self, grad):
        self.dense_grad = grad.clone() if self.scheduler.check_if_backward_hook_should_accumulate_grad() else None
        return grad * self.scheduler.backward_masks[self.layer]
