"""A training script in ITOP's manner: blocks that call F.relu, learning-rate schedulers made before the host, the best
state dict saved by validation and reloaded strictly before the final test. Prints every loss in full."""

import argparse
import copy

import others
import sparselearning
import torch
import torch.nn.functional as F
from sparselearning.core import CosineDecay, Masking
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class Net(nn.Module):
    def __init__(self, width, blocks):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.classifier = nn.Linear(width, 4, bias=False)

    def forward(self, x):
        x = self.layer1(F.relu(self.conv1(x)))
        return F.log_softmax(self.classifier(x.mean((2, 3))), 1)


def data(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 4
    for i in range(n):
        x[i, y[i] % 3] += 1 + y[i] // 3
    return TensorDataset(x, y)


def accuracy(model, loader):
    model.eval()
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).sum().item() for x, y in loader) / len(loader.dataset)


def density(model):
    weights = [w for n, w in model.named_parameters() if w.dim() > 1 and "act" not in n]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def build_host(args, optimizer, steps):
    if args.host == "itop":
        host = Masking(
            optimizer,
            death_rate=args.death_rate,
            death_rate_decay=CosineDecay(args.death_rate, steps),
            growth_mode=args.growth,
            redistribution_mode="none",
            args=args,
        )
        return host, dict(density=args.density)
    if args.host == "sparse_learning":
        cls = others.sparse_learning()
        others.Masking = cls
        return cls(optimizer, others.Decay(args.death_rate, steps), args.death_rate), dict(density=args.density)
    if args.host == "granet":
        args.init_density, args.final_density, args.method, args.sparse_init = args.density, args.density, "DST", "ERK"
        return others.Masking(
            optimizer, prune_rate=0.5, prune_rate_decay=CosineDecay(0.5, steps), args=args, train_loader=range(10)
        ), {}
    return others.Masking(optimizer, 0.9), {}


def train(args):
    torch.manual_seed(args.seed)
    train_loader = DataLoader(data(40, 1), batch_size=4, shuffle=True)
    valid_loader, test_loader = DataLoader(data(16, 2), batch_size=16), DataLoader(data(16, 3), batch_size=16)
    model = Net(args.width, args.blocks).to("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.epochs // 2]),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.99**epoch),
    ]
    host, steps = None, len(train_loader) * args.epochs
    if args.host == "rigl":
        host = others.RigLScheduler(model, optimizer, dense_allocation=args.density, T_end=int(0.75 * steps), delta=4)
    elif args.sparse:
        host, given = build_host(args, optimizer, steps)
        host.add_module(model, **given)
    best, best_model = -1.0, None
    for epoch in range(args.epochs):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = F.nll_loss(model(x), y)
            loss.backward()
            print(f"loss {loss.item()!r} density {density(model):.6f}")
            if args.host == "rigl":
                if host():
                    optimizer.step()
            elif host is not None:
                host.step()
            else:
                optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if hasattr(host, "at_end_of_epoch") and epoch < args.epochs - 1:
            host.at_end_of_epoch()
        valid = accuracy(model, valid_loader) if not args.first_is_best else -epoch / args.epochs
        if valid > best:
            print(f"saving epoch {epoch}")
            best, best_model = valid, copy.deepcopy(model)
            torch.save(model.state_dict(), args.save)
    print(f"final: {accuracy(model, test_loader):.6f} density {density(model):.6f}")
    model.load_state_dict(torch.load(args.save))
    print(f"test: {accuracy(model, test_loader):.6f} density {density(model):.6f}")
    print(f"copy: {accuracy(best_model, test_loader):.6f}")
    print("modules:", sorted({type(m).__name__ for m in model.modules()}), "parameters:", len(list(model.parameters())))


def main():
    parser = argparse.ArgumentParser(description="A script in ITOP's manner")
    parser.add_argument("--host", default="itop")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iters", type=int, default=1)
    parser.add_argument("--save", default="best.pt")
    parser.add_argument("--first-is-best", action="store_true")
    sparselearning.core.add_sparse_args(parser)
    args = parser.parse_args()
    others.Masking = {"granet": others.granet, "unknown": others.unknown}.get(args.host, lambda: None)()
    print(args)
    for _ in range(args.iters):
        train(args)


if __name__ == "__main__":
    main()
