"""A network sharded in one process, which has the same tensors as with several; test_processes has two."""

from __future__ import annotations

import copy

import torch
from helpers.forks import in_a_fork, start_group
from torch.distributed.tensor import DTensor

from uvit import UViT
from uvit.config import TrainConfig, average_path
from uvit.training.averages import Averages
from uvit.training.sharding import reshard, shard, unshard, unshard_network
from uvit.weights.tensors import read_weights

X, TIMES = torch.ones(2, 1, 8, 8), torch.tensor([3.0, 700.0])


@in_a_fork
def test_a_sharded_network_predicts_and_is_unsharded(tiny):
    start_group()
    network = UViT(tiny)
    whole = copy.deepcopy(network)
    shard(network, torch.device("cpu"), 1)
    assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
    torch.testing.assert_close(network(X, TIMES), whole(X, TIMES))
    state = unshard({"model": network.state_dict(), "step": 3}, keep=True)
    assert state["step"] == 3 and list(state["model"]) == list(whole.state_dict())
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in whole.state_dict().items())
    assert all(not part.numel() for part in unshard(network.state_dict(), keep=False).values())

    again = unshard_network(network, keep=True)
    assert not any(isinstance(parameter, DTensor) for parameter in again.parameters())
    assert torch.equal(again(X, TIMES), whole(X, TIMES))
    assert unshard_network(network, keep=False) is network


@in_a_fork
def test_whole_tensors_are_sharded_like_those_of_the_network(tiny):
    start_group()
    other, network = UViT(tiny), UViT(tiny)
    shard(network, torch.device("cpu"), 1)
    parts = reshard({**other.state_dict(), "step": 3}, network.state_dict())
    assert parts.pop("step") == 3 and all(isinstance(part, DTensor) for part in parts.values())
    network.load_state_dict(parts)
    torch.testing.assert_close(network(X, TIMES), other(X, TIMES))


def test_tensors_of_an_unsharded_network_stay_as_they_are(tiny):
    state = UViT(tiny).state_dict()
    for given in (reshard(state, state), unshard(state, keep=True), unshard(state, keep=False)):
        assert all(given[name] is tensor for name, tensor in state.items())


@in_a_fork
def test_averages_are_sharded_as_the_network_is(tiny, tmp_path):
    start_group()
    network = UViT(tiny)
    networks = [network, copy.deepcopy(network)]
    shard(network, torch.device("cpu"), 1)
    sharded, plain = kept = [Averages(each, TrainConfig(average_widths=(0.1, 0.2)), tmp_path) for each in networks]
    for _ in range(3):
        for each, averages in zip(networks, kept):
            for parameter in each.parameters():
                parameter.data.mul_(1.5)
            averages.update(each)
    assert all(isinstance(tensor, DTensor) for tensor in sharded.averages[0.2].values())
    sharded.snapshot(3, is_end=True, is_main=True)
    written = read_weights(average_path(tmp_path, 3))
    torch.testing.assert_close(written, plain.state_dict(), rtol=1e-6, atol=0)
    again = Averages(network, TrainConfig(average_widths=(0.1, 0.2)), tmp_path)
    again.load_state_dict(reshard(written, again.state_dict()))
    assert again.updates == 3
    torch.testing.assert_close(unshard(again.state_dict(), keep=True), written, rtol=0, atol=0)
