"""A transformer trained densely, then fine-tuned sparsely: magnitude pruning as the start, updates by a prune criterion
(Nowak et al. 2023, Appendices C and H). Images of digits are read as eight rows."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from east_plugins import Masking

torch.manual_seed(0)
pixels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
rows, labels = pixels.float().view(-1, 8, 8) / 8 - 1, labels.long()
train, test = slice(0, 1400), slice(1400, None)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


def fit(model, optimizer, step, epochs):
    for _ in range(epochs):
        for some in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(rows[train][some]), labels[train][some]).backward()
            step()


@torch.no_grad()
def accuracy(model):
    return float((model(rows[test]).argmax(1) == labels[test]).float().mean())


if __name__ == "__main__":
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fit(model, optimizer, optimizer.step, epochs=8)
    print(f"dense {accuracy(model):.3f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    mask = Masking(optimizer, death_rate=0.3, death_mode="SNIP", growth_mode="gradient", update_frequency=20)
    mask.add_module(model, density=0.2, sparse_init="magnitude", exclude=["embed", "head"])
    print(f"pruned {accuracy(model):.3f}: {mask.nonzeros} of {mask.theoretical_size} weights active")
    fit(model, optimizer, mask.step, epochs=4)
    print(f"fine-tuned {accuracy(model):.3f}: {mask.nonzeros} of {mask.theoretical_size} weights active")
