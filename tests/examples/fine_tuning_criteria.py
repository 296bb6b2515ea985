"""Which prune criterion is best where a dense transformer is pruned by magnitude and fine-tuned: a table of test
accuracies in %, mean and deviation over as many seeds as the first word says (Nowak et al. 2023, Tables 5 and 6)."""

import sys
import tempfile
from pathlib import Path

import torch
from fine_tuning import Reader, accuracy, fit

from east_plugins import CosineDecay, Masking

SEEDS = range(int(sys.argv[1]) if sys.argv[1:] else 3)
DENSITIES = [float(word) for word in sys.argv[2:]] or [0.5, 0.2, 0.1, 0.05]
CRITERIA = ["magnitude", "SET", "MEST", "rsensitivity", "SNIP", "random"]
EPOCHS, STEPS = 8, 8 * 22


def train_densely(seed, path):
    torch.manual_seed(seed)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit(model, optimizer, optimizer.step, EPOCHS)
    torch.save(model.state_dict(), path)
    return 100 * accuracy(model)


def fine_tune(seed, path, density, rate, rules):
    torch.manual_seed(seed)  # the same batches for all
    model = Reader()
    model.load_state_dict(torch.load(path, weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mask = Masking(optimizer, death_rate_decay=CosineDecay(rate, STEPS), update_frequency=20, seed=seed, **rules)
    mask.add_module(model, density=density, sparse_init="magnitude", exclude=["embed", "head"])
    fit(model, optimizer, mask.step, EPOCHS)
    return 100 * accuracy(model)


if __name__ == "__main__":
    paths = [Path(tempfile.mkdtemp(), f"{seed}.pt") for seed in SEEDS]
    print(f"dense {[round(train_densely(*each), 1) for each in enumerate(paths)]}\n| criterion, growth |", *DENSITIES)
    kinds = {"static": (0.0, {})}
    for growth in ("random", "gradient"):
        kinds |= {f"{rule}, {growth}": (0.5, dict(death_mode=rule, growth_mode=growth)) for rule in CRITERIA}
    for name, death in kinds.items():
        found = torch.tensor([[fine_tune(*each, d, *death) for each in enumerate(paths)] for d in DENSITIES])
        shown = [f"{each.mean():.1f} +- {each.std(correction=0):.1f}" for each in found]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)
