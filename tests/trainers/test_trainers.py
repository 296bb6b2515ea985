"""Real runs of two epochs in other people's trainers, beside the plain loop with `mask.step()`: the same weights to
1e-9 in float64, the same masks, exact counts."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from east_plugins import Engine, Masking, PhaseOut, UsageError, attach, factory
from east_plugins.trainers import save_with_optimizer

slow = pytest.mark.slow  # what runs in a trainer

SHAPE, BATCH, BATCHES, EPOCHS, EVERY = (3, 8, 8), 4, 12, 2, 5
CLIP = 0.3


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, 5),
        )
        nn.init.normal_(self[1].bias, std=0.3)
        self.double()


class Images(torch.utils.data.Dataset):
    def __init__(self, half=False):
        draw = torch.Generator().manual_seed(7)
        dtype = torch.float32 if half else torch.float64
        self.x = torch.randn(BATCH * BATCHES, *SHAPE, generator=draw, dtype=dtype)
        self.y = torch.randint(5, (len(self.x),), generator=draw)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def loader(half=False):
    return torch.utils.data.DataLoader(Images(half), BATCH)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def host_of(net, optimizer, engine=None, density=0.2, growth="gradient", **kwargs):
    mask = Masking(optimizer, death_rate=0.3, growth_mode=growth, update_frequency=EVERY, seed=0, **kwargs)
    mask.add_module(net, density=density, sparse_init="connected", input_shape=SHAPE)
    if engine:
        Engine(mask, SHAPE, engine)
    return mask


class Average(AveragedModel):
    """The running average of a network's weights, for as long as the network has the same ones."""

    def __init__(self, net):
        super().__init__(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def update_parameters(self, net):
        if len(list(self.module.parameters())) == len(list(net.parameters())):
            super().update_parameters(net)


class Ours:
    """The plain loop; `half` is bfloat16 autocast over float32 weights."""

    def __init__(self, accumulate=1, clip=0.0, epochs=EPOCHS, make=sgd, half=False, net=None, **kwargs):
        self.net = net or (Net().float() if half else Net())
        optimizer = make(self.net)
        self.mask = host_of(self.net, optimizer, **kwargs)
        self.first = {name: mask.clone() for name, mask in self.mask.masks.items()}
        self.average = Average(self.net)
        for _ in range(epochs):
            for i, (x, y) in enumerate(loader(half), 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = F.cross_entropy(self.net(x), y) / accumulate
                loss.backward()
                if i % accumulate == 0:
                    if clip:
                        nn.utils.clip_grad_norm_(self.net.parameters(), clip)
                    self.mask.step()
                    optimizer.zero_grad()
                    self.average.update_parameters(self.net)


def assert_close(found, wanted, name, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


def assert_same(net, mask, ours, tolerance=1e-9):
    assert mask.steps == ours.mask.steps and mask.nonzeros == ours.mask.nonzeros
    assert mask.nonzeros == sum(int(each.sum()) for each in mask.masks.values())
    for (name, found), wanted in zip(mask.masks.items(), ours.mask.masks.values(), strict=True):
        assert torch.equal(found, wanted), name
        assert not net.get_parameter(name)[~found].any(), name
        assert not torch.equal(found, ours.first[name]) or found.all(), f"{name} was never updated"
    for (name, found), wanted in zip(net.state_dict().items(), ours.net.state_dict().values(), strict=True):
        assert_close(found, wanted, name, tolerance)


def assert_same_average(average, ours):
    for found, wanted in zip(average.module.parameters(), ours.average.module.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- the trainers, by one signature


def module_of(net, make=sgd, **methods):
    """A LightningModule that trains a network."""
    pl = pytest.importorskip("lightning.pytorch")

    def init(self):
        pl.LightningModule.__init__(self)
        self.net = net

    methods["training_step"] = lambda self, batch: F.cross_entropy(self.net(batch[0]), batch[1])
    methods["configure_optimizers"] = lambda self: make(self.net)
    return type("Module", (pl.LightningModule,), {"__init__": init, **methods})()


def lightning_trainer(folder, epochs, *callbacks, **kwargs):
    pl = pytest.importorskip("lightning.pytorch")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    precision = {} if "plugins" in kwargs else {"precision": kwargs.pop("precision", "64-true")}
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, accelerator="cpu",
        **quiet, **precision, **kwargs,
    )  # fmt: skip


def sparse_callback(**kwargs):
    pytest.importorskip("lightning.pytorch")
    from east_plugins.trainers.lightning import SparseCallback

    return SparseCallback(lambda module, optimizer, steps: host_of(module.net, optimizer, **kwargs))


def lightning(
    folder, net, *, accumulate=1, clip=0.0, epochs=EPOCHS, make=sgd, resume=False, compiled=False, half=False, **kwargs
):
    averages = []

    def on_train_batch_end(self, *_):
        if not averages:
            averages.append(Average(self.net))
        averages[0].update_parameters(self.net)

    module, sparse = module_of(net, make, on_train_batch_end=on_train_batch_end), sparse_callback(**kwargs)
    module.strict_loading = "plugins" not in kwargs  # past DyReLU's phase its parameters are in no checkpoint
    trainer = lightning_trainer(
        folder, epochs, sparse, accumulate_grad_batches=accumulate, gradient_clip_val=clip or None,
        precision="bf16-mixed" if half else "64-true",
    )  # fmt: skip
    fitted = torch.compile(module, backend="eager") if compiled else module
    trainer.fit(fitted, loader(half), ckpt_path=folder / "half.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "half.ckpt")
    return sparse.mask, averages[0]


class Labelled(nn.Module):
    """A network as Hugging Face's trainer takes it."""

    _keys_to_ignore_on_save = None

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels, labels):
        return {"loss": F.cross_entropy(self.net(pixels), labels)}


def collated(pairs):
    pixels, labels = zip(*pairs, strict=True)
    return {"pixels": torch.stack(pixels), "labels": torch.stack(labels)}


def huggingface_trainer(folder, net, optimizer=None, half=False, **arguments):
    transformers = pytest.importorskip("transformers")
    arguments = {"num_train_epochs": EPOCHS, "max_grad_norm": 0.0, "save_strategy": "epoch", **arguments}
    args = transformers.TrainingArguments(
        folder, per_device_train_batch_size=BATCH, use_cpu=True, lr_scheduler_type="constant", report_to=[], bf16=half,
        train_sampling_strategy="sequential", disable_tqdm=True, **arguments,
    )  # fmt: skip
    return transformers.Trainer(Labelled(net), args, collated, train_dataset=Images(half), optimizers=(optimizer, None))


def huggingface(
    folder, net, *, accumulate=1, clip=0.0, epochs=EPOCHS, make=sgd, resume=False, compiled=False, half=False, **kwargs
):
    transformers = pytest.importorskip("transformers")
    from east_plugins.trainers.huggingface import SparseCallback

    class Averaging(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            average.update_parameters(net)

    optimizer = make(net)
    mask = host_of(net, optimizer, **kwargs)
    average = Average(net)
    trainer = huggingface_trainer(
        folder, net, optimizer, half, num_train_epochs=epochs, gradient_accumulation_steps=accumulate,
        max_grad_norm=clip, torch_compile=compiled, torch_compile_backend="eager" if compiled else None,
    )  # fmt: skip
    trainer.add_callback(SparseCallback(mask))
    trainer.add_callback(Averaging())
    trainer.train(resume_from_checkpoint=resume)
    return mask, average


def accelerate(
    folder, net, *, accumulate=1, clip=0.0, epochs=EPOCHS, make=sgd, resume=False, compiled=False, half=False, **kwargs
):
    accelerate = pytest.importorskip("accelerate")
    dynamo = accelerate.utils.TorchDynamoPlugin(backend="eager") if compiled else None
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, dynamo_plugin=dynamo, mixed_precision="bf16" if half else "no"
    )
    optimizer = make(net)
    mask = host_of(net, optimizer, **kwargs)
    save_with_optimizer(mask)
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader(half))
    average = Average(net)
    if resume:
        accelerator.load_state(folder / "half", strict="plugins" not in kwargs)
    for _ in range(mask.steps * accumulate // BATCHES, epochs):
        for x, y in batches:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if clip and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                average.update_parameters(net)
    accelerator.save_state(folder / "half")
    return mask, average


every_trainer = pytest.mark.parametrize("trainer", [lightning, huggingface, accelerate])


@slow
@every_trainer
@pytest.mark.parametrize("engine", [None, "sparse"])
@pytest.mark.parametrize("accumulate, clip", [(1, 0.0), (2, CLIP)])
def test_a_run_is_that_of_the_plain_loop(trainer, engine, accumulate, clip, tmp_path):
    net = Net()
    mask, _ = trainer(tmp_path, net, engine=engine, accumulate=accumulate, clip=clip)
    ours = Ours(accumulate, clip, engine=engine)
    assert_same(net, mask, ours)
    assert mask.steps == EPOCHS * BATCHES // accumulate
    assert engine is None or not mask.engine.dense


@slow
@every_trainer
@pytest.mark.parametrize("growth, density", [("momentum", 0.2), ("random", 0.05)])
def test_other_rules_and_densities_are_those_of_the_plain_loop(trainer, growth, density, tmp_path):
    net = Net()
    mask, _ = trainer(tmp_path, net, growth=growth, density=density)
    assert_same(net, mask, Ours(growth=growth, density=density))


@slow
@every_trainer
@pytest.mark.parametrize("engine", [None, "sparse"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(trainer, engine, tmp_path):
    trainer(tmp_path, Net(), epochs=1, engine=engine)
    net = Net()
    mask, _ = trainer(tmp_path, net, resume=True, engine=engine)
    assert_same(net, mask, Ours(engine=engine))


@slow
@every_trainer
@pytest.mark.parametrize("compiled", [False, True])
def test_averages_of_weights_and_compiled_models_are_those_of_the_plain_loop(trainer, compiled, tmp_path):
    net = Net()
    mask, average = trainer(tmp_path, net, compiled=compiled)
    ours = Ours()
    assert_same(net, mask, ours)
    assert_same_average(average, ours)


def fading(end):
    """A network with DyReLUs that end at a step, and what ends them."""
    net = Net()
    phase_out, generator = PhaseOut(4, end), torch.Generator().manual_seed(0)
    return net, attach(net, factory("b"), SHAPE, phase_out=phase_out, generator=generator)


@slow
@every_trainer
@pytest.mark.parametrize("end", [9, 17])
def test_a_checkpoint_in_and_past_the_phase_of_dyrelu_goes_on(trainer, end, tmp_path):
    net, phased = fading(end)
    trainer(tmp_path, net, epochs=1, plugins=[phased])
    assert bool(phased.sites) == (end > BATCHES)
    net, phased = fading(end)
    mask, _ = trainer(tmp_path, net, resume=True, plugins=[phased])
    assert not phased.sites
    whole, phased = fading(end)
    assert_same(net, mask, Ours(net=whole, plugins=[phased]))


# ---------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("engine", [None, "sparse"])
def test_steps_that_a_scaler_skips_are_no_steps_of_the_host(fused, engine):
    """Every third batch overflows; the update that falls on one waits for the next."""

    def trained(scaled):
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=fused)
        mask = host_of(net, optimizer, engine)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6)
        for i, (x, y) in enumerate([*loader(), *loader()]):
            overflows = i % 3 == 1
            if scaled:
                loss = F.cross_entropy(net(x), y)
                scaler.scale(loss * torch.inf if overflows else loss).backward()
                before = copy.deepcopy(net.state_dict()) if overflows else {}
                scaler.step(optimizer)
                scaler.update(64.0)
                running = ("running_mean", "running_var", "num_batches_tracked")
                assert all(torch.equal(net.state_dict()[n], v) for n, v in before.items() if not n.endswith(running))
            elif overflows:
                net(x)  # running statistics see it
            else:
                F.cross_entropy(net(x), y).backward()
                mask.step()
            optimizer.zero_grad()
        return net, mask

    net, mask = trained(True)
    whole, reference = trained(False)
    assert mask.steps == reference.steps == 16
    for (name, found), wanted in zip(net.state_dict().items(), whole.state_dict().values(), strict=True):
        assert_close(found, wanted, name)
    assert all(torch.equal(each, reference.masks[name]) for name, each in mask.masks.items())


@slow
@every_trainer
@pytest.mark.parametrize("engine", [None, "sparse"])
def test_bfloat16_of_the_trainer_is_that_of_the_plain_loop(trainer, engine, tmp_path):
    net = Net().float()
    mask, _ = trainer(tmp_path, net, half=True, engine=engine)
    assert_same(net, mask, Ours(half=True, engine=engine))


@slow
@pytest.mark.parametrize("engine", [None, "sparse"])
def test_steps_that_lightning_skips_in_half_precision_count_for_nobody(engine, tmp_path):
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=10**6)
    module, sparse = module_of(Net().float()), sparse_callback(engine=engine)
    trainer = lightning_trainer(tmp_path, EPOCHS, sparse, plugins=[plugins.MixedPrecision("16-mixed", "cpu", scaler)])
    trainer.fit(module, loader(half=True))
    skipped = round(30 - math.log2(scaler.get_scale()))
    assert skipped > 5 and sparse.mask.steps == EPOCHS * BATCHES - skipped
    weights = {name: module.net.get_parameter(name) for name in sparse.mask.masks}
    assert all(w.isfinite().all() and not w[~sparse.mask.masks[name]].any() for name, w in weights.items())
    assert sparse.mask.nonzeros == sum(int(mask.sum()) for mask in sparse.mask.masks.values()) == 666


# ---------------------------------------------------------------------- what only one of them does


@slow
def test_the_average_of_lightnings_callback_may_be_swapped_in(tmp_path):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    validated = []

    def validation_step(self, batch):
        validated.append(self.net[0].weight.detach().clone())

    module, sparse = module_of(Net(), validation_step=validation_step), sparse_callback()
    average = callbacks.EMAWeightAveraging(decay=0.9)
    lightning_trainer(tmp_path, EPOCHS, sparse, average, num_sanity_val_steps=0).fit(module, loader(), loader())
    ours = Ours()
    assert sparse.mask.steps == ours.mask.steps
    assert all(torch.equal(mask, ours.mask.masks[name]) for name, mask in sparse.mask.masks.items())
    assert_close(validated[-1], ours.average.module[0].weight, "the average at the last validation")
    assert_close(module.net[0].weight, ours.average.module[0].weight, "what the callback leaves at the end")


@slow
def test_another_fit_of_lightning_goes_on_with_the_same_host(tmp_path):
    module, sparse = module_of(Net()), sparse_callback()
    for _ in range(2):
        lightning_trainer(tmp_path, 1, sparse).fit(module, loader())
    ours = Ours(epochs=1)
    ours.mask.optimizer = sgd(ours.net)
    for x, y in loader():
        ours.mask.optimizer.zero_grad()
        F.cross_entropy(ours.net(x), y).backward()
        ours.mask.step()
    assert_same(module.net, sparse.mask, ours)


@slow
def test_a_run_of_lightning_without_an_end_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the run has no end"):
        lightning_trainer(tmp_path, -1, sparse_callback()).fit(module_of(Net()), loader())


@slow
def test_the_optimizer_may_be_huggingfaces_own(tmp_path):
    pytest.importorskip("transformers")
    from east_plugins.trainers.huggingface import SparseCallback

    net = Net()
    trainer = huggingface_trainer(tmp_path, net, learning_rate=0.01, weight_decay=0.1)
    mask = host_of(net, trainer.create_optimizer())
    trainer.add_callback(SparseCallback(mask))
    trainer.train()
    assert type(mask.optimizer) is torch.optim.AdamW and mask.optimizer.defaults["fused"]

    def adamw(net):
        decayed = [parameter for name, parameter in net.named_parameters() if "bias" not in name]
        others = [parameter for name, parameter in net.named_parameters() if "bias" in name]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01)

    assert_same(net, mask, Ours(make=adamw))


@slow
def test_huggingface_with_another_optimizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from east_plugins.trainers.huggingface import SparseCallback

    net = Net()
    trainer = huggingface_trainer(tmp_path, net)
    trainer.add_callback(SparseCallback(host_of(net, sgd(net))))
    with pytest.raises(UsageError, match=r"another optimizer than the host's; make the host with .*create_optimizer"):
        trainer.train()


@slow
def test_a_checkpoint_of_huggingface_without_an_optimizer_is_refused(tmp_path):
    pytest.importorskip("transformers")
    from east_plugins.trainers.huggingface import SparseCallback

    for resume in (False, True):
        net = Net()
        optimizer = sgd(net)
        epochs = 1 + resume
        trainer = huggingface_trainer(tmp_path, net, optimizer, num_train_epochs=epochs, save_only_model=True)
        trainer.add_callback(SparseCallback(host_of(net, optimizer)))
        if resume:
            with pytest.raises(UsageError, match="no optimizer state"):
                trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()


# ---------------------------------------------------------------------- in a loop of one's own


def test_a_checkpoint_of_an_optimizer_alone_goes_on(tmp_path):
    ours = Ours(epochs=1)
    save_with_optimizer(ours.mask)
    save_with_optimizer(ours.mask)  # twice is once
    saved = copy.deepcopy((ours.net.state_dict(), ours.mask.optimizer.state_dict()))
    net = Net()
    optimizer = sgd(net)
    mask = host_of(net, optimizer)
    save_with_optimizer(mask)
    optimizer.load_state_dict(saved[1])
    net.load_state_dict(saved[0])
    for x, y in loader():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert_same(net, mask, Ours())


def test_a_checkpoint_without_a_hosts_state_is_refused_and_nothing_changes():
    net = Net()
    mask = host_of(net, sgd(net))
    save_with_optimizer(mask)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match="has no host's state"):
        mask.optimizer.load_state_dict(sgd(Net()).state_dict())
    assert all(torch.equal(found, before[name]) for name, found in net.state_dict().items()) and mask.steps == 0


def test_a_host_without_a_model_cannot_be_saved():
    with pytest.raises(UsageError, match="call add_module"):
        save_with_optimizer(Masking(sgd(Net())))
