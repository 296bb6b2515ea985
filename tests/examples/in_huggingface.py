"""Hugging Face's trainer with a sparse network: the ten lines of east_plugins/trainers/README.md around a toy."""

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from east_plugins import Masking
from east_plugins.trainers.huggingface import SparseCallback
from east_plugins.training.models import build


class Classifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build("resnet20", num_classes=10, image_size=16)

    def forward(self, pixels, labels):
        return {"loss": cross_entropy(self.net(pixels), labels)}


images = [{"pixels": torch.randn(3, 16, 16), "labels": i % 10} for i in range(32)]
args = TrainingArguments("hf", num_train_epochs=2, per_device_train_batch_size=8, use_cpu=True, report_to=[])
model = Classifier()
trainer = Trainer(model, args, train_dataset=images)
mask = Masking.of(
    "rigl+connected", model.net, trainer.create_optimizer(), density=0.01, steps=8, input_shape=(3, 16, 16)
)
trainer.add_callback(SparseCallback(mask))
trainer.train()
print(f"{mask.steps} steps, {mask.nonzeros} active weights")
