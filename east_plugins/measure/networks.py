"""The networks that are timed: what they are, which of their weights are active, and the hosts that train them."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import UnknownNameError
from ..host.masking import Masking
from ..host.values import sparse_fan_in
from ..ops.doing import doing
from ..ops.maskable import maskable, modules_of
from ..plugins import registry
from ..plugins.activation import attach, factory
from ..plugins.rate import Cosine
from ..sparse.engine import Engine
from ..training import models
from .published import itop_core

#: Kind of masks to the allocation that draws them; `trained` ones RigL has moved since.
MASKS = {"connected": "connected", "ERK": "ERK", "trained": "ERK", "connected-trained": "connected"}
UPDATES, BETWEEN, IMAGES = 20, 5, 32  # of the RigL run that trained masks come from


@dataclass(frozen=True)
class Subject:
    """A network to time, for images of 3 x `image_size` x `image_size`.

    Attributes:
        masks: "connected" or "ERK", drawn so; "trained" and "connected-trained": those of a RigL run, from an ERK or a
            connected start, after its 20th topology update.
        activation: in place of every ReLU, undiluted, such as "dyrelu-b".
        share: with weight sharing from the second block of a stage on.
        dctps: with DCTpS layers.
    """

    model: str = "resnet34"
    classes: int = 100
    density: float = 0.0005
    masks: str = "connected"
    width: int | None = None
    image_size: int = 32
    activation: str | None = None
    share: bool = False
    dctps: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.masks not in MASKS:
            raise UnknownNameError("kind of masks", self.masks, MASKS)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return 3, self.image_size, self.image_size

    def build(self, channels_last: bool = False, **optimizer: Any) -> Network:
        """A new one, always with the same values; `optimizer` are settings of SGD."""
        doing(f"making {self.model}")
        return Network(self, channels_last, **optimizer)

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """Its masks by name of the weight, on its device."""
        network = self.build()
        doing(f"drawing masks, {self.masks}")
        host = network.masked(
            MASKS[self.masks], "gradient", BETWEEN, death_rate_decay=Cosine(0.5, 2 * UPDATES * BETWEEN)
        )
        if "trained" in self.masks:
            _rigl(network, host)
        return {name: mask.clone() for name, mask in host.masks.items()}

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """A batch of noise and labels."""
        x = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(1))
        return x.to(self.device), torch.arange(count, device=self.device) % self.classes


class Network:
    """A subject's network with SGD; which host trains it is said afterwards."""

    def __init__(self, subject: Subject, channels_last: bool = False, **optimizer: Any):
        torch.manual_seed(subject.seed)
        self.subject = subject
        self.model = models.build(subject.model, subject.classes, 3, subject.image_size, subject.width)
        if subject.dctps:
            registry.transform.get("dctps")(self.model)
        if subject.share:
            registry.transform.get("share")(self.model, 2)
        self.model.to(subject.device)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.phased = None
        if subject.activation:
            self.phased = attach(self.model, factory(subject.activation), subject.shape)
        settings: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, **optimizer}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **settings)

    def masked(
        self, masks: str | Mapping[str, Tensor], growth: str, update_frequency: int | None = None, **settings: Any
    ) -> Masking:
        """Our host, with these masks or with those that an allocation draws."""
        host = Masking(
            self.optimizer, growth_mode=growth, update_frequency=update_frequency, seed=self.subject.seed, **settings
        )
        allocation = masks if isinstance(masks, str) else "ERK"
        drawn = {name: weight.detach().clone() for name, weight in maskable(self.model).items()}
        host.add_module(self.model, self.subject.density, allocation, input_shape=self.subject.shape)
        if not isinstance(masks, str):
            for name, mask in masks.items():
                host.masks[name].copy_(mask)
                host.weights[name].data.copy_(drawn[name] * mask)
            host.load_state_dict(host.state_dict())
        return host

    def itop(self, checkout: Path, growth: str) -> Any:
        """ITOP's own host, from a checkout, with ERK's masks."""
        core = itop_core(checkout)
        host = core.Masking(
            self.optimizer, growth_mode=growth, redistribution_mode="none", death_rate=0.5,
            args=Namespace(fix=False, update_frequency=sys.maxsize), death_rate_decay=core.CosineDecay(0.5, 1000),
        )  # fmt: skip
        host.add_module(self.model, density=self.subject.density, sparse_init="ERK")
        return host

    def draw_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)


def with_gradients(subject: Subject) -> Network:
    """A network with random gradients whose optimizer has run once."""
    network = subject.build(lr=1e-6)
    network.draw_gradients()
    network.optimizer.step()
    return network


def for_inference(subject: Subject) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network in evaluation mode, with norms as training could leave them and values for the active fan-in, and
    its masks."""
    network = subject.build()
    host, generator = network.masked(subject.drawn, "random"), torch.Generator().manual_seed(subject.seed)
    randomise_norms(network.model, generator)
    sparse_fan_in(maskable(network.model), host.masks, generator, modules_of(network.model))
    return network.model.eval(), dict(host.masks)


def randomise_norms(model: nn.Module, generator: torch.Generator) -> None:
    """Scales, shifts and statistics as training could leave them; fresh ones make dead channels exactly zero."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def _rigl(network: Network, host: Masking) -> None:
    """20 topology updates, five steps apart, on classes that are patterns in noise."""
    subject = network.subject
    engine = Engine(host, subject.shape, "sparse")
    generator = torch.Generator().manual_seed(subject.seed)
    patterns = torch.randn(subject.classes, *subject.shape, generator=generator)
    for _ in range(UPDATES * BETWEEN):
        labels = torch.randint(subject.classes, (IMAGES,), generator=generator)
        x = patterns[labels] + torch.randn(IMAGES, *subject.shape, generator=generator)
        network.optimizer.zero_grad()
        cross_entropy(network.model(x.to(subject.device)), labels.to(subject.device)).backward()
        host.step()
    engine.remove()
