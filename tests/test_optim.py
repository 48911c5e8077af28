from __future__ import annotations

import pytest
import torch
from timm.optim import muon

from uvit import UViT
from uvit.config import OptimConfig
from uvit.training import optim
from uvit.training.optim import build_optimizer, build_schedule, load_optimizer_state, lr_factor


def test_adamw_decays_every_parameter(tiny):
    optimizer = build_optimizer(UViT(tiny), OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.03))
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.03} and optimizer.defaults["betas"] == (0.9, 0.95)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(UViT(tiny).parameters()))


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(tiny):
    model = UViT(tiny, num_classes=5)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1e-2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fallback = {names[id(p)] for group in optimizer.param_groups if group.get("use_fallback") for p in group["params"]}
    outside = {name for name in names.values() if "block" not in name and not name.startswith("norm.")}
    assert fallback == outside
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    left, _, right = torch.linalg.svd(torch.randn(128, 32), full_matrices=False)
    model.mid_block.mlp.fc1.weight.grad = left @ torch.diag(torch.linspace(0.05, 1, 32)) @ right
    optimizer.step()
    update = model.mid_block.mlp.fc1.weight.detach() - before["mid_block.mlp.fc1.weight"]
    singular = torch.linalg.svdvals(update)
    assert singular.max() / singular.min() < 2.5  # orthogonalised: all directions about alike, 20 apart before
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("has_bf16", [False, True])
def test_muon_orthogonalises_in_bf16_only_where_the_processor_has_it(tiny, monkeypatch, has_bf16):
    monkeypatch.setattr(optim, "cpu_has_bf16", lambda: has_bf16)
    model, of_timm = UViT(tiny), muon.zeropower_via_newtonschulz
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0, momentum=0.0))
    weight = model.mid_block.mlp.fc1.weight
    with torch.no_grad():
        weight.zero_()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    update = weight / torch.linalg.matrix_norm(weight)
    expected = of_timm(weight.grad, 5, muon._COEFFICIENTS["quintic"], dtype=torch.float32)
    difference = torch.linalg.matrix_norm(update + expected / torch.linalg.matrix_norm(expected))
    assert (difference > 1e-3) if has_bf16 else (difference < 1e-5)
    assert muon.zeropower_via_newtonschulz is of_timm


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_muon_follows_nesterovs_momentum(tiny, monkeypatch, momentum):
    """The average of gradients so far, looked ahead by one: (1 - μ) g + μ m with m = μ m + (1 - μ) g."""
    monkeypatch.setattr(optim, "cpu_has_bf16", lambda: False)
    model = UViT(tiny)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=1.0, weight_decay=0.0, momentum=momentum))
    weight, average = model.mid_block.mlp.fc1.weight, 0.0
    for _ in range(3):
        before, gradient = weight.detach().clone(), torch.randn_like(weight)
        weight.grad = gradient.clone()
        optimizer.step()
        average = momentum * average + (1 - momentum) * gradient
        ahead = (1 - momentum) * gradient + momentum * average
        expected = muon.zeropower_via_newtonschulz(ahead, 5, muon._COEFFICIENTS["quintic"], dtype=torch.float32)
        update = before - weight.detach()
        assert torch.cosine_similarity(update.flatten(), expected.flatten(), dim=0) > 1 - 1e-5


def test_adamw_of_muon_has_its_own_rate_and_looks_ahead_too(tiny):
    model = UViT(tiny)
    config = OptimConfig(name="muon", lr=1e-2, weight_decay=0.0, fallback_lr_scale=0.5, betas=(0.5, 0.75))
    optimizer, weight = build_optimizer(model, config), model.decoder_pred.weight
    before, average = weight.detach().clone(), 0.0
    for step, sign in enumerate((1, -1), start=1):  # the square of the gradient is 1, and so is its average
        weight.grad = sign * torch.ones_like(weight)
        optimizer.step()
        average = 0.5 * average + 0.5 * sign
        before -= 0.5 * 1e-2 * (0.5 * average + 0.5 * sign) / (1 - 0.5**step)
        torch.testing.assert_close(weight.detach(), before)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_learning_rates(decay, expected):
    config = OptimConfig(warmup_steps=2, decay=decay)
    assert [lr_factor(step, 6, config) for step in range(6)] == pytest.approx(expected, abs=1e-4)
    assert lr_factor(2, 2, config) == 1  # all of the run is warm-up


def test_the_first_update_of_a_warm_up_changes_nothing(tiny):
    model = UViT(tiny)
    config = OptimConfig(lr=1e-3, warmup_steps=10)
    optimizer = build_optimizer(model, config)
    set_learning_rate = build_schedule(optimizer, config, 100)
    before = model.mid_block.mlp.fc1.weight.detach().clone()
    model(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 500.0])).square().sum().backward()
    assert set_learning_rate(0) == 0
    optimizer.step()
    assert torch.equal(model.mid_block.mlp.fc1.weight, before)
    assert set_learning_rate(1) == pytest.approx(1e-4)
    optimizer.step()
    assert not torch.equal(model.mid_block.mlp.fc1.weight, before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_learning_rates_equal_peak_times_factor_also_after_resuming(tiny, name, decay):
    """With a scaled rate for the part that Muon leaves to AdamW, and a state that another schedule has left behind."""
    config = OptimConfig(name=name, lr=1e-2, warmup_steps=2, decay=decay, fallback_lr_scale=0.5)
    model = UViT(tiny)
    optimizer, resumed = build_optimizer(model, config), build_optimizer(UViT(tiny), config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate = build_schedule(optimizer, config, 6)
    model(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 500.0])).square().sum().backward()
    for step in range(6):
        if step == 3:
            load_optimizer_state(resumed, optimizer.state_dict())
            set_resumed = build_schedule(resumed, config, 6)
        factor = lr_factor(step, 6, config)
        assert set_learning_rate(step) == peaks[0] * factor
        assert [group["lr"] for group in optimizer.param_groups] == [peak * factor for peak in peaks]
        optimizer.step()
        if step >= 3:
            assert set_resumed(step) == peaks[0] * factor
            assert [group["lr"] for group in resumed.param_groups] == [peak * factor for peak in peaks]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_restored_and_settings_are_not(tiny, name):
    model = UViT(tiny)
    before = build_optimizer(model, OptimConfig(name=name, lr=1e-2, weight_decay=0.03, betas=(0.8, 0.9)))
    model(torch.randn(2, 1, 8, 8), torch.tensor([5.0, 500.0])).square().sum().backward()
    before.step()
    settings = OptimConfig(name=name, lr=1e-3, weight_decay=0.1, betas=(0.5, 0.6))
    after, fresh = (build_optimizer(UViT(tiny), settings) for _ in range(2))
    load_optimizer_state(after, before.state_dict())
    saved, loaded = before.state_dict(), after.state_dict()
    assert loaded["state"].keys() == saved["state"].keys() and loaded["state"]
    for number, moments in saved["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(loaded["state"][number][key], value, rtol=0, atol=0)
    assert loaded["param_groups"] == fresh.state_dict()["param_groups"]

    load_optimizer_state(after, fresh.state_dict())  # of a run that has taken no step
    assert not after.state_dict()["state"]
    few = {**saved, "state": {number: saved["state"][number] for number in [*saved["state"]][1:]}}
    count = len(saved["state"])
    with pytest.raises(ValueError, match=f"its optimizer has state of {count - 1} parameters, expected {count}"):
        load_optimizer_state(after, few)


def test_the_state_of_another_optimizer_is_refused(tiny):
    adamw, muon = (build_optimizer(UViT(tiny), OptimConfig(name=name)) for name in ("adamw", "muon"))
    with pytest.raises(ValueError, match="its optimizer is a different one"):
        load_optimizer_state(adamw, muon.state_dict())
