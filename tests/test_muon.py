"""Muon with matrices updated together, against timm's own, which updates them one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.forks import in_a_fork, start_group
from timm.optim import create_optimizer_v2
from timm.optim import muon as timm_muon
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from uvit import UNet, UViT
from uvit.training import muon
from uvit.training.muon import update_together

NETWORKS = {
    "u-vit": lambda: UViT(img_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=3),
    "u-net": lambda: UNet(img_size=8, in_chans=1, model_channels=32, channel_mult=(1, 2), attention_sizes=(4,)),
}


def build(network, together=False):
    settings = dict(lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True, fallback_list=network.muon_fallback)
    optimizer = create_optimizer_v2(network, "muon", **settings)
    if together:
        update_together(optimizer, cpu_dtype=torch.bfloat16)
    return optimizer


def take_steps(network, optimizer, num_steps=3):
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        for parameter in network.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient
            if isinstance(parameter, DTensor):
                parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        optimizer.step()


@pytest.mark.parametrize("largest", [2**22, 5_000, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_and_momentum_are_those_of_timms_own(name, largest, monkeypatch):
    """In stacks of all matrices of a shape, of a few, and of one; kernels are flattened as in timm's."""
    monkeypatch.setattr(muon, "MAX_STACKED", largest)
    torch.manual_seed(0)
    network = NETWORKS[name]()
    expected = copy.deepcopy(network)
    of_timm, ours = build(expected), build(network, together=True)
    take_steps(expected, of_timm)
    take_steps(network, ours)
    for parameter, same in zip(network.parameters(), expected.parameters()):
        torch.testing.assert_close(parameter, same, rtol=1e-6, atol=1e-6)
        for key, value in of_timm.state[same].items():
            torch.testing.assert_close(ours.state[parameter][key], value, rtol=1e-6, atol=1e-6)


def test_matrices_of_one_shape_are_orthogonalised_in_one_call(monkeypatch):
    shapes, product = [], torch.baddbmm

    def counted(summand, left, *rest, **options):
        shapes.append(left.shape)
        return product(summand, left, *rest, **options)

    monkeypatch.setattr(torch, "baddbmm", counted)
    network = NETWORKS["u-vit"]()
    take_steps(network, build(network, together=True), num_steps=1)
    # Four kinds of matrices in each of three blocks, with three products in each of five iterations.
    assert (
        len(shapes) == 4 * 3 * 5 and {len(shape) for shape in shapes} == {3} and {shape[0] for shape in shapes} == {3}
    )


def test_timms_module_is_as_before_after_each_step():
    before = timm_muon.muon, timm_muon.zeropower_via_newtonschulz
    network = NETWORKS["u-vit"]()
    take_steps(network, build(network, together=True), num_steps=1)
    assert (timm_muon.muon, timm_muon.zeropower_via_newtonschulz) == before


@in_a_fork
def test_sharded_matrices_are_left_to_timm():
    start_group()
    torch.manual_seed(0)
    network = NETWORKS["u-vit"]()
    expected = copy.deepcopy(network)
    mesh = init_device_mesh("cpu", (1,))
    for module in network.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh)))
    take_steps(network, build(network, together=True))
    take_steps(expected, build(expected, together=True))
    for parameter, same in zip(network.parameters(), expected.parameters()):
        torch.testing.assert_close(parameter.full_tensor(), same.detach(), rtol=1e-2, atol=1e-3)
