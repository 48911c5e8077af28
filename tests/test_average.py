"""Average velocity: the loss against others and against closed forms, derivatives, intervals, guidance, drawing."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.gaussian import MEAN, STD

from uvit import UNet, UViT
from uvit.common.errors import InputError
from uvit.config import AVERAGE_TIME_SCALE, ProcessConfig, SampleConfig, replace_fields
from uvit.diffusion.average import (
    DIFFERENCE_STEPS,
    average_loss,
    average_velocity,
    check_shares,
    derivative,
    num_intervals,
    sample_guidance,
    sample_intervals,
    scale_at,
)
from uvit.diffusion.objective import diffusion_loss
from uvit.diffusion.process import sample_times, schedule_of
from uvit.diffusion.samplers import sample
from uvit.diffusion.solvers import average

AVERAGE = ProcessConfig(objective="average", adaptive_power=0.0)
BATCH = 6
X0, NOISE = torch.randn(2, BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.tensor([0.02, 0.2, 0.45, 0.6, 0.85, 1.0], dtype=torch.float64)
S = T * torch.tensor([0.0, 0.5, 0.9, 0.1, 0.3, 0.0], dtype=torch.float64)
LABELS = torch.arange(BATCH)
UVIT = dict(img_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=10, null_class=True)
UNET = dict(img_size=8, in_chans=1, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_sizes=(4,))
NETWORKS = {
    "U-ViT": lambda **fields: UViT(**UVIT, **fields),
    "U-ViT, norms": lambda **fields: UViT(**UVIT, qk_norm=True, mlp_time_embed=True, patch_embed="conv", **fields),
    "U-ViT, adaln": lambda **fields: UViT(**UVIT, time_conditioning="adaln", pos_embed="sincos2d", **fields),
    "U-Net": lambda **fields: UNet(**UNET, num_classes=10, null_class=True, head_dim=32, **fields),
}


@pytest.fixture(autouse=True)
def seeded():
    """The same initial weights in every test."""
    torch.manual_seed(1)


def shaken(network):
    """A network without parameters that are zero, as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return network


def spread(t, std=STD):
    return ((1 - t) ** 2 * std**2 + t**2) ** 0.5


def gaussian_velocity(x, s, t, std=STD):
    """The average velocity over [s, t] of N(MEAN, std²): the ODE keeps how many standard deviations x_t is away."""
    away = (x - (1 - t) * MEAN) / spread(t, std)
    end = (1 - s) * MEAN + spread(s, std) * away
    instant = -MEAN + away * (t - (1 - t) * std**2) / spread(t, std)
    same = torch.as_tensor(s == t)
    return torch.where(same, instant, (x - end) / torch.where(same, torch.ones(()), torch.as_tensor(t - s)))


def gaussian_network(prediction="flow", std=STD):
    """A network that is the closed form, in the units of its times."""

    def network(x, timesteps, interval):
        t = (timesteps / AVERAGE_TIME_SCALE).reshape(-1, 1, 1, 1)
        s = t - (interval / AVERAGE_TIME_SCALE).reshape(-1, 1, 1, 1)
        u = gaussian_velocity(x, s, t, std)
        return u if prediction == "flow" else x - t.clamp(min=0.05) * u

    return network


@pytest.mark.parametrize("prediction", ["flow", "data"])
@pytest.mark.parametrize("std", [STD, 0.0])
def test_the_closed_form_of_gaussian_data_is_the_optimum(prediction, std):
    """It leaves only what x_t does not determine, ε - x_0 without its mean: nothing for data of a single value."""
    process = replace_fields(AVERAGE, {"prediction": prediction})
    x0 = MEAN + std * X0
    network = gaussian_network(prediction, std)
    start = S.clamp(min=0.01)  # a square root has no slope at 0
    found = average_loss(network, x0, process, intervals=(start, T), noise=NOISE)
    t = T.reshape(-1, 1, 1, 1)
    instant = gaussian_velocity((1 - t) * x0 + t * NOISE, t, t, std)
    # The loss is in float32.
    assert found.item() == pytest.approx((NOISE - x0 - instant).square().mean().item(), rel=1e-5, abs=1e-9)
    if std == 0:
        assert found.item() < 1e-9


@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.5, 0.0], [0.9, 0.7, 0.2, 0.05]])
@pytest.mark.parametrize("prediction", ["flow", "data"])
def test_exact_average_velocities_land_exactly_whatever_the_steps(times, prediction):
    network, process = gaussian_network(prediction), replace_fields(AVERAGE, {"prediction": prediction})

    def denoise(x, t, s):
        t, s = (torch.tensor(each, dtype=torch.float64) for each in (t, s))
        scale = AVERAGE_TIME_SCALE
        u = average_velocity(process.prediction, network(x, scale * t, scale * (t - s)), x, t.item())
        return x - t * u, x + (1 - t) * u

    reached = average(denoise, X0, schedule_of(process), times)
    first, last = times[0], times[-1]
    expected = (1 - last) * MEAN + spread(last) / spread(first) * (X0 - (1 - first) * MEAN)
    torch.testing.assert_close(reached, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_evaluation_a_step_draws_gaussian_data(steps):
    calls = []
    config = SampleConfig(sampler="average", num_steps=steps)
    images = sample(gaussian_network(), AVERAGE, config, lambda: NOISE.float(), {}, on_evaluation=calls.append)
    torch.testing.assert_close(images, (MEAN + STD * NOISE).float(), rtol=0, atol=1e-5)
    assert len(calls) == steps


def test_a_solver_of_instants_draws_with_the_velocity_of_an_instant():
    config = SampleConfig(sampler="heun", num_steps=50)
    images = sample(gaussian_network(), AVERAGE, config, lambda: NOISE.float(), {})
    torch.testing.assert_close(images, (MEAN + STD * NOISE).float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("network", NETWORKS)
def test_without_an_interval_the_loss_is_that_of_flow_matching(network):
    """And so is its gradient."""
    model = shaken(NETWORKS[network](takes_interval=True))
    x0, noise, t = X0.float(), NOISE.float(), T.float()
    instant = ProcessConfig(time_scale=AVERAGE_TIME_SCALE)
    expected = diffusion_loss(lambda x, t: model(x, t, LABELS), x0, instant, times=t, noise=noise)
    found = average_loss(model, x0, AVERAGE, cond={"y": LABELS}, intervals=(t, t), noise=noise)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    parameters = [*model.parameters()]
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("attention", ["auto", "sdpa", "math"])
def test_derivatives_equal_central_differences(network, attention):
    model = shaken(NETWORKS[network](takes_interval=True, takes_guidance=True, attention=attention).double())
    guidance = torch.tensor([[2.0, 0.1, 0.9]], dtype=torch.float64).expand(BATCH, -1)
    scale = AVERAGE_TIME_SCALE

    def velocity(x, t, length):
        return model(x, scale * t, LABELS, interval=scale * length, guidance=guidance)

    with torch.no_grad():
        found = derivative(velocity, X0, T, T - S, NOISE)
        h = 1e-5
        ahead, behind = (velocity(X0 + step * NOISE, T + step, T - S + step) for step in (h, -h))
    expected = (ahead - behind) / (2 * h)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("network", NETWORKS)
def test_differences_over_a_short_time_are_near_derivatives(network):
    """Over times that are long enough for each precision: bf16's rounding is larger over those of fp32."""
    model = shaken(NETWORKS[network](takes_interval=True))
    x, t, s, along = (each.float() for each in (X0, T, S, NOISE))

    def velocity(x, t, length):
        return model(x, 3 * t, LABELS, interval=3 * length).float()

    def error(step):
        difference = derivative(velocity, x, t, t - s, along, "differences", step)
        return ((difference - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact = derivative(velocity, x, t, t - s, along, "forward")
        assert 0 < error(DIFFERENCE_STEPS["no"]) < 1e-3
        with torch.autocast("cpu", torch.float16):
            assert error(DIFFERENCE_STEPS["fp16"]) < 0.15
        with torch.autocast("cpu", torch.bfloat16):
            assert 2 * error(DIFFERENCE_STEPS["bf16"]) < error(DIFFERENCE_STEPS["no"])
            assert error(DIFFERENCE_STEPS["bf16"]) < 0.7


@pytest.mark.parametrize("prediction", ["flow", "data"])
def test_the_loss_by_differences_is_near_that_by_derivatives(prediction):
    model = shaken(NETWORKS["U-ViT, norms"](takes_interval=True))
    x0, noise, s, t = (each.float() for each in (X0, NOISE, S, T))
    given = {"cond": {"y": LABELS}, "intervals": (s, t), "noise": noise}
    exact, near = (
        average_loss(model, x0, replace_fields(AVERAGE, {"prediction": prediction, "derivative": how}), **given)
        for how in ("forward", "differences")
    )
    assert exact != near
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", ["flow", "data"])
def test_the_loss_is_that_of_its_formula(prediction):
    """Of u + (t - s) du/dt as a velocity, with the derivative by central differences, and weights of its own."""
    process = replace_fields(AVERAGE, {"prediction": prediction, "adaptive_power": 0.75, "time_scale": 3.0})
    model = shaken(NETWORKS["U-ViT, norms"](takes_interval=True))
    x0, noise, s, t = (each.float() for each in (X0, NOISE, S, T))
    found = average_loss(model, x0, process, cond={"y": LABELS}, intervals=(s, t), noise=noise)

    def u(x, t, length, weights=model):
        output = weights(x, 3 * t, LABELS, interval=3 * length)
        return output if prediction == "flow" else (x - output) / t.clamp(min=0.05).reshape(-1, 1, 1, 1)

    end = t.reshape(-1, 1, 1, 1)
    x_t = (1 - end) * x0 + end * noise
    double, h = shaken(NETWORKS["U-ViT, norms"](takes_interval=True)).double(), 1e-5
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        wide = [each.double() for each in (x_t, t, t - s)]
        instant = u(*wide[:2], torch.zeros_like(wide[1]), double)
        ahead, behind = (u(wide[0] + k * instant, wide[1] + k, wide[2] + k, double) for k in (h, -h))
    moved = u(x_t, t, t - s) + (t - s).reshape(-1, 1, 1, 1) * ((ahead - behind) / (2 * h)).float()
    errors = (moved - (noise - x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, errors.mean(), rtol=1e-4, atol=0)
    weighted = (errors / (errors.detach() + 0.01) ** 0.75).mean()
    parameters = [*model.parameters()]
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(weighted, parameters)):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4 * max(other.abs().max().item(), 1e-3))


def test_guided_targets():
    """v + (1 - 1/w) (u_cond - u_uncond), the velocities those of an instant, and w is 1 outside its interval."""
    seen = []

    def network(x, timesteps, interval, y, guidance=None):
        seen.append((y, interval, guidance))
        return (y.reshape(-1, 1, 1, 1) + 1.0).expand_as(x)

    t = torch.full((3,), 0.5)
    guidance = torch.tensor([[4.0, 0.2, 0.8], [4.0, 0.6, 0.8], [1.0, 0.0, 1.0]])
    x0, noise = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    found = average_loss(
        network,
        x0,
        AVERAGE,
        cond={"y": torch.tensor([1, 1, 1])},
        guidance=guidance,
        uncond={"y": torch.tensor([4, 4, 4])},
        intervals=(t, t),
        noise=noise,
    )
    # u is 2, and the target 0 + 3/4 (2 - 5) where guidance acts.
    assert found.item() == pytest.approx(((2 + 9 / 4) ** 2 + 2**2 + 2**2) / 3)
    unconditional = [each for each in seen if each[0][0] == 4]
    assert len(unconditional) == 1 and unconditional[0][2] is None
    assert all(each[2] is guidance or torch.equal(each[2], guidance) for each in seen if each[0][0] == 1)
    with pytest.raises(InputError, match=r"guidance in training needs an empty condition, got none"):
        average_loss(network, x0, AVERAGE, guidance=guidance)


def test_gradients_flow_through_one_call_alone():
    calls = []

    def bare(x, timesteps, interval):
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        return model(x, timesteps, LABELS[: len(x)], interval=interval)

    model = shaken(NETWORKS["U-ViT"](takes_interval=True))
    process = ProcessConfig(objective="average", instant_share=1 / 3)
    loss = average_loss(
        lambda x, **given: model(x, y=LABELS, **given), X0.float(), process, torch.Generator().manual_seed(0), bare=bare
    )
    loss.backward()
    assert calls == [4, 4]
    assert all(each.grad is not None and each.grad.abs().max() > 0 for each in model.parameters())


def test_the_output_must_have_the_shape_of_the_images():
    with pytest.raises(InputError, match=r"the network must predict \(3, 1, 8, 8\) as x0 has, got \(3, 2, 8, 8\)"):
        average_loss(lambda x, **given: torch.cat([x, x], dim=1), X0, AVERAGE)


@pytest.mark.parametrize("start", ["uniform", "pair"])
def test_intervals(start):
    process = ProcessConfig(
        objective="average", interval_start=start, instant_share=0.25, time_distribution="logit_normal", logit_mean=0.5
    )
    s, t = sample_intervals(process, 40_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    number = num_intervals(process, len(t))
    assert number == 30_000 and (s[:number] < t[:number]).all() and torch.equal(s[number:], t[number:])
    times = sample_times(process, 40_000, torch.device("cpu"), torch.Generator().manual_seed(1))
    if start == "uniform":  # the end is a training time, and the start anywhere before it
        assert t.mean().item() == pytest.approx(times.mean().item(), abs=0.005)
        shares = s[:number] / t[:number]
        assert shares.mean().item() == pytest.approx(0.5, abs=0.005)
        assert shares.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.005)
    else:  # both are training times
        both = torch.cat([s[:number], t[:number]])
        assert both.mean().item() == pytest.approx(times.mean().item(), abs=0.005)
        assert both.std().item() == pytest.approx(times.std().item(), abs=0.005)
    assert s.min() >= 0 and t.max() <= 1


def test_random_numbers_are_of_the_device_and_dtype_of_the_images():
    process, cpu = ProcessConfig(objective="average"), torch.device("cpu")
    with torch.device("meta"):  # not on the default device
        for start in ("uniform", "pair"):
            drawn = sample_intervals(replace_fields(process, {"interval_start": start}), 4, cpu, torch.Generator("cpu"))
            assert [each.device.type for each in drawn] == ["cpu", "cpu"]
        assert sample_guidance(process, 4, cpu, torch.Generator("cpu")).device.type == "cpu"
    # Its noise is that of double precision, where the images are.
    generator = torch.Generator().manual_seed(0)
    intervals = sample_intervals(process, BATCH, cpu, generator)
    noise = torch.randn(X0.shape, dtype=torch.float64, generator=generator)
    found = average_loss(gaussian_network(), X0, process, torch.Generator().manual_seed(0))
    assert torch.equal(found, average_loss(gaussian_network(), X0, process, intervals=intervals, noise=noise))


def test_a_part_of_a_batch_needs_intervals_and_instants():
    check_shares(ProcessConfig(), 2)
    check_shares(ProcessConfig(instant_share=0.0), 1)
    for share, batch, lacking in ((0.5, 1, "interval"), (0.1, 4, "instant")):
        with pytest.raises(InputError, match=f"must leave an {lacking} among the images of a part, got {batch} images"):
            check_shares(ProcessConfig(instant_share=share), batch)


def test_how_many_intervals_are_none_of_an_instant():
    counts = [num_intervals(ProcessConfig(instant_share=share), 10) for share in (0.0, 0.24, 0.25, 0.5, 0.96)]
    assert counts == [10, 8, 7, 5, 0]


def test_guidance_in_training():
    process = ProcessConfig(guidance_max=5.0)
    guidance = sample_guidance(process, 20_000, torch.device("cpu"), torch.Generator().manual_seed(0))
    scale, low, high = guidance.unbind(1)
    assert scale.min() >= 1 and 4.9 < scale.max() <= 5
    assert scale.log().mean().item() == pytest.approx(math.log(5) / 2, abs=0.01)  # log-uniform
    assert low.min() >= 0 and low.max() <= 0.5 <= high.min() and high.max() <= 1
    assert low.mean().item() == pytest.approx(0.25, abs=0.01) and high.mean().item() == pytest.approx(0.75, abs=0.01)


def test_scales_at_times():
    guidance = torch.tensor([[3.0, 0.2, 0.6]]).expand(5, -1)
    assert scale_at(guidance, torch.tensor([0.1, 0.2, 0.4, 0.6, 0.7])).tolist() == [1, 3, 3, 3, 1]
