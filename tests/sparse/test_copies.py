"""Active entries of many tensors, to and from one vector in one call."""

import pytest
import torch

from east_plugins.host.packed import Copies
from east_plugins.ops.active import Active, All
from east_plugins.sparse import kernel
from east_plugins.sparse.copies import CompiledCopies

SHAPES = [(64, 30, 3, 3), (7,), (20, 11), (1, 1, 1, 1), (9, 4, 3, 3)]


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    tensors[4] = tensors[4].contiguous(memory_format=torch.channels_last)
    sets = [Active(torch.rand(t.shape, generator=generator) < 0.2) for t in tensors]
    sets[1], sets[4] = All(tensors[1].shape), All(tensors[4].shape)
    return tensors, sets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reads_and_writes_what_pytorch_does(dtype):
    tensors, sets = make(dtype)
    ours, theirs = CompiledCopies(sets), Copies(sets)
    read = theirs.read(tensors)
    # the entries of a whole tensor come in the order of its memory
    assert torch.equal(ours.read(tensors).sort().values, read.sort().values)
    assert torch.equal(ours.read(tensors[:4] + [tensors[4].contiguous()]), read)
    versions = [tensor._version for tensor in tensors]
    doubled = [tensor * 2 for tensor in tensors]
    others = [tensor.clone() for tensor in tensors]
    theirs.write(others, 2 * read)
    ours.write(tensors, 2 * ours.read(tensors))
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert torch.equal(tensors[1], doubled[1]) and torch.equal(tensors[4], doubled[4])
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


def test_values_and_gradients_of_another_layout_go_to_the_same_places():
    tensors, sets = make(torch.float64)
    ours = CompiledCopies(sets)
    assert torch.equal(ours.read(tensors), ours.read([tensor.contiguous() for tensor in tensors]))
    expanded = [torch.tensor(3.0, dtype=torch.float64).expand(shape) for shape in SHAPES]
    assert torch.equal(ours.read(expanded), torch.full((sum(map(len, sets)),), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_without_a_kernel_pytorch_copies(dtype, monkeypatch):
    monkeypatch.setattr(kernel, "load", lambda dtype: pytest.fail("no kernel is wanted"))
    tensors, sets = make(dtype)
    assert torch.equal(CompiledCopies(sets).read(tensors), Copies(sets).read(tensors))
