"""A growth rule of one's own with an option, used by name. On the command line, in this folder, it is
`--growth own_rule:GradientToUnfired --growth-again 0.5`."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from east_plugins import Layer, Masking, growth, option


@growth.register("gradient_to_unfired", needs=("grad",))
@dataclass(frozen=True)
class GradientToUnfired:
    """Largest gradient, the scores of weights that were active before times `again`."""

    again: float = option(0.1, "factor on weights that were active before", type=float)

    def __call__(self, layer: Layer) -> Tensor:
        return layer.grad.abs() * torch.where(layer.fired, self.again, 1.0)


if __name__ == "__main__":
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = dict(growth="gradient_to_unfired", growth_again=0.0, update_frequency=5)
    mask = Masking.of("rigl", model, optimizer, density=0.05, steps=40, **settings)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(10, (32,))).backward()
        mask.step()
    fired = sum(int(fired.sum()) for fired in mask.fired_masks.values())
    print(f"{mask.nonzeros} weights are active, {fired} were at some time")
