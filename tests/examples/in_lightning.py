"""Lightning's trainer with a sparse network: the ten lines of east_plugins/trainers/README.md around a toy."""

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy

from east_plugins import Masking
from east_plugins.trainers.lightning import SparseCallback
from east_plugins.training.models import build


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build("resnet20", num_classes=10, image_size=16)

    def training_step(self, batch):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def sparse(module, optimizer, steps):
    return Masking.of("rigl+connected", module.net, optimizer, density=0.01, steps=steps, input_shape=(3, 16, 16))


images = torch.utils.data.TensorDataset(torch.randn(32, 3, 16, 16), torch.randint(10, (32,)))
callback = SparseCallback(sparse)
trainer = pl.Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Classifier(), torch.utils.data.DataLoader(images, 8))
print(f"{callback.mask.steps} steps, {callback.mask.nonzeros} active weights")
