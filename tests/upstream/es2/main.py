"""A training script in the manner of ES2's: DyReLU and weight sharing in the network, gradients clipped by the norm of
all, cycles told to the host between its making and `add_module`. Prints the host's report after every epoch."""

import argparse

import sparselearning
import torch
import torch.nn.functional as F
from sparselearning.core import CosineDecay, Masking
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset


class DyReLUB(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, 4 * channels)
        self.beta = 1.0

    def forward(self, x):
        if self.beta <= 0:
            return F.relu(x)
        theta = torch.tanh(self.fc2(F.relu(self.fc1(x.mean((2, 3)))))).view(len(x), -1, 4, 1, 1)
        one = 1 + self.beta * theta[:, :, 0]
        other = self.beta * 0.5 * theta[:, :, 1]
        return torch.maximum(one * x + self.beta * theta[:, :, 2], other * x + self.beta * theta[:, :, 3])


def norm_and_act(width, plain):
    return nn.BatchNorm2d(width), nn.ReLU() if plain else DyReLUB(width)


class Block(nn.Module):
    def __init__(self, width, plain):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.relu1 = norm_and_act(width, plain)

    def forward(self, x, weight=None):
        return self.relu1(self.bn1(self.conv1(x)) + x)


class Borrower(nn.Module):
    def __init__(self, width, plain):
        super().__init__()
        self.scale_1 = nn.Parameter(torch.rand(1))
        self.bn1, self.relu1 = norm_and_act(width, plain)

    def forward(self, x, weight):
        return self.relu1(self.bn1(F.conv2d(x, self.scale_1 * weight, padding=1)) + x)


class Net(nn.Module):
    def __init__(self, width, ratio, plain):
        super().__init__()
        self.ratio = ratio
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        blocks = [(Block if i < ratio else Borrower)(width, plain) for i in range(4)]
        self.layer1 = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, 4, bias=False)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        for block in self.layer1:
            x = block(x, self.layer1[self.ratio - 1].conv1.weight if self.ratio <= len(self.layer1) else None)
        return self.classifier(x.mean((2, 3)))

    def get_shared_para(self):
        lent = max(0, len(self.layer1) - self.ratio)
        return lent * self.layer1[self.ratio - 1].conv1.weight.numel() if lent else 0


def main():
    parser = argparse.ArgumentParser(description="A script in ES2's manner")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--multiplier", type=int, default=1)
    parser.add_argument("--ratio", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="ReLU in place of DyReLU")
    parser.add_argument("--cyclic", action="store_true")
    parser.add_argument("--num_cycles", type=int, default=2)
    parser.add_argument("--cyclic-length", type=int, default=1)
    parser.add_argument("--cyclic-length-multiplier", type=float, default=1.0)
    parser.add_argument("--density_max_multiplier", type=int, default=3)
    parser.add_argument("--cyclic-pattern", default="triangular")
    sparselearning.core.add_sparse_args(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    x = torch.randn(40, 3, 6, 6)
    loader = DataLoader(TensorDataset(x, x.mean((2, 3)).argmax(1)), batch_size=4, shuffle=True)
    model = Net(8, args.ratio, args.plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.epochs // 2, args.epochs * 3 // 4])
    steps = len(loader) * args.epochs * args.multiplier
    mask = Masking(
        optimizer,
        death_rate=args.death_rate,
        death_mode="magnitude",
        death_rate_decay=CosineDecay(args.death_rate, steps),
        growth_mode=args.growth,
        redistribution_mode="none",
        args=args,
    )
    own = sum(w.numel() for n, w in model.named_parameters() if "conv" in n or "classifier" in n)
    if args.cyclic:
        first = args.cyclic_length * len(loader)
        mask.steps_per_cycle = [first * args.cyclic_length_multiplier**i for i in range(args.num_cycles)]
        mask.cyclic_end_step = sum(mask.steps_per_cycle)
    mask.add_module(model, sparse_init="ERK", density=args.density * (own + model.get_shared_para()) / own)
    for epoch in range(args.epochs * args.multiplier):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            clip_grad_norm_(model.parameters(), max_norm=1.0)
            mask.step()
            print(
                f"loss {loss.item()!r} step {mask.steps} active {sum(int((m != 0).sum()) for m in mask.masks.values())}"
            )
        scheduler.step()
        print(f"epoch {epoch}", mask.get_metrics())
    for module in model.modules():
        if isinstance(module, DyReLUB):
            module.beta = 0.0
    model.eval()
    with torch.no_grad():
        print(f"test: {F.cross_entropy(model(loader.dataset.tensors[0]), loader.dataset.tensors[1]).item():.6f}")


if __name__ == "__main__":
    main()
