from __future__ import annotations

import pytest
import torch

from uvit.common.errors import InputError
from uvit.config import ProcessConfig
from uvit.diffusion.objective import diffusion_loss
from uvit.diffusion.process import SCHEDULES, combine, prediction_coefficients, separate

KINDS = ["noise", "data", "v", "flow"]
X0 = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])


def network(x, timesteps):
    """Any function of noisy image and time."""
    return 0.7 * x + 1e-3 * timesteps[:, None, None, None]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_mean_squared_error(name, kind):
    process = ProcessConfig(schedule=name, prediction=kind)
    loss = diffusion_loss(network, X0, process, times=TIMES, noise=NOISE)
    alpha, sigma = (value[:, None, None, None] for value in SCHEDULES[name].alpha_sigma(TIMES))
    target = {"noise": NOISE, "data": X0, "v": alpha * NOISE - sigma * X0, "flow": NOISE - X0}[kind]
    timesteps = {"vp": 999 * TIMES, "ddpm": 1000 * TIMES - 1, "iddpm": 1000 * TIMES - 1}.get(name, 1000 * TIMES)
    output = network(alpha * X0 + sigma * NOISE, timesteps)
    torch.testing.assert_close(loss, (output - target).square().mean())


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_prediction_has_no_loss_in_any_space(name):
    for kind in KINDS:
        for space in KINDS:
            process = ProcessConfig(schedule=name, prediction=kind, loss_space=space, weighting="min_snr")
            alpha, sigma = (value[:, None, None, None] for value in SCHEDULES[name].alpha_sigma(TIMES))
            exact = combine(kind, X0, NOISE, alpha, sigma)
            assert diffusion_loss(lambda x, t: exact, X0, process, times=TIMES, noise=NOISE).item() < 1e-9  # noqa: B023


def test_data_prediction_with_flow_loss_is_the_data_error_over_sigma_squared():
    process = ProcessConfig(schedule="flow", prediction="data", loss_space="flow")
    loss = diffusion_loss(network, X0, process, times=TIMES, noise=NOISE)
    t = TIMES[:, None, None, None]
    error = network((1 - t) * X0 + t * NOISE, 1000 * TIMES) - X0
    torch.testing.assert_close(loss, (error.square() / t**2).mean())


ENDS = torch.tensor([0.0, 1e-4, 0.02, 0.5, 0.98, 1.0])


def test_the_flow_loss_of_data_divides_by_a_time_that_is_clamped():
    """JiT, arXiv 2511.13720: both velocities are (x_t - x) / max(t, m), in its code with 1 - t for our t."""
    process = ProcessConfig(schedule="flow", prediction="data", loss_space="flow", min_divisor=0.05)
    loss = diffusion_loss(network, X0, process, times=ENDS, noise=NOISE)
    t = ENDS[:, None, None, None]
    x_t = (1 - t) * X0 + t * NOISE
    velocity, target = ((x_t - x) / t.clamp(min=0.05) for x in (network(x_t, 1000 * ENDS), X0))
    torch.testing.assert_close(loss, (velocity - target).square().mean())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", ["data", "noise"])
@pytest.mark.parametrize("space", KINDS)
def test_a_divisor_is_clamped_in_any_space_and_elsewhere_changes_nothing(name, kind, space):
    if kind == space:
        return
    plain, clamped = (
        ProcessConfig(schedule=name, prediction=kind, loss_space=space, min_divisor=least) for least in (0.0, 0.3)
    )
    alpha, sigma = SCHEDULES[name].alpha_sigma(TIMES)
    divisor = sigma if kind == "data" else alpha
    assert (divisor < 0.3).any() and (divisor > 0.3).any()
    for number, each in enumerate(divisor):
        one = {"times": TIMES[number : number + 1], "noise": NOISE[number : number + 1]}
        before, now = (diffusion_loss(network, X0[number : number + 1], p, **one) for p in (plain, clamped))
        torch.testing.assert_close(now, before * (each / each.clamp(min=0.3)).square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_exact_prediction_has_no_loss_at_the_ends_under_a_clamp(name):
    for kind in ("data", "noise"):
        for space in set(KINDS) - {kind}:
            process = ProcessConfig(schedule=name, prediction=kind, loss_space=space, min_divisor=0.05)
            exact = X0 if kind == "data" else NOISE
            times = SCHEDULES[name].snap(ENDS)
            assert diffusion_loss(lambda x, t: exact, X0, process, times=times, noise=NOISE) == 0  # noqa: B023
            assert diffusion_loss(lambda x, t: exact + 1, X0, process, times=times, noise=NOISE) < 1e3  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [None, *KINDS])
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_without_a_clamp_the_loss_is_that_of_before_to_the_bit(kind, space, weighting):
    """As it was written before there was one, with the times kept from the ends."""
    process = ProcessConfig(prediction=kind, loss_space=space, weighting=weighting, schedule="vp")
    loss = diffusion_loss(network, X0, process, torch.Generator().manual_seed(5))
    generator, other = torch.Generator().manual_seed(5), space or kind
    times = torch.rand(6, generator=generator)
    noise = torch.randn(X0.shape, generator=generator)
    if other != kind or weighting != "none":
        times = times.clamp(1e-3, 1 - 1e-3)
    alpha, sigma = (value[:, None, None, None] for value in SCHEDULES["vp"].alpha_sigma(times))
    x_t = alpha * X0 + sigma * noise
    output = network(x_t, 999.0 * times)
    if other != kind:
        output = combine(other, *separate(kind, output, x_t, alpha, sigma), alpha, sigma)
    error = (output - combine(other, X0, noise, alpha, sigma)).square()
    if weighting == "min_snr":
        a, b = prediction_coefficients(other, alpha, sigma)
        error = error * (alpha / sigma).square().clamp(max=5.0) * (sigma / (alpha * b - sigma * a)).square()
    assert torch.equal(loss, error.mean())


NOWHERE = r"min_divisor must be 0 unless the error of 'data' or 'noise' is converted to another loss_space, got 0.05"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction": "data"}, NOWHERE),
        ({"prediction": "data", "loss_space": "data"}, NOWHERE),
        ({"prediction": "flow", "loss_space": "data"}, NOWHERE),
        ({"prediction": "v", "loss_space": "flow"}, NOWHERE),
        ({"prediction": "data", "objective": "average"}, "min_divisor must be 0 with objective 'average', got 0.05"),
        (
            {"prediction": "data", "loss_space": "flow", "weighting": "min_snr"},
            "weighting must be 'none' with a min_divisor, got 'min_snr'",
        ),
        ({"min_divisor": 1.0}, r"min_divisor must be in \[0, 1\), got 1.0"),
        ({"min_divisor": -0.1}, r"min_divisor must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_clamp_is_refused_where_nothing_is_divided(fields, message):
    with pytest.raises(InputError, match=message):
        ProcessConfig(**{"min_divisor": 0.05, **fields})


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("noise", lambda snr: snr.clamp(max=5) / snr),
        ("data", lambda snr: snr.clamp(max=5)),
        ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),
    ],
)
def test_min_snr_weights_equal_those_of_the_paper(kind, weight):
    """Hang et al., arXiv 2303.09556, section 3.4, for each prediction under a variance-preserving schedule."""
    process = ProcessConfig(schedule="vp", prediction=kind, weighting="min_snr")
    loss = diffusion_loss(network, X0, process, times=TIMES, noise=NOISE)
    alpha, sigma = (value[:, None, None, None] for value in SCHEDULES["vp"].alpha_sigma(TIMES))
    error = network(alpha * X0 + sigma * NOISE, 999 * TIMES) - combine(kind, X0, NOISE, alpha, sigma)
    torch.testing.assert_close(loss, (weight((alpha / sigma) ** 2) * error.square()).mean())


@pytest.mark.parametrize("fields", [{"loss_space": "data"}, {"weighting": "min_snr"}])
def test_times_keep_clear_of_ends_where_an_error_would_be_divided_by_nothing(fields):
    process = ProcessConfig(schedule="flow", prediction="noise", **fields)
    ends, inside = torch.tensor([0.0, 1.0] * 3), torch.tensor([1e-3, 1 - 1e-3] * 3)
    given, expected = (diffusion_loss(network, X0, process, times=each, noise=NOISE) for each in (ends, inside))
    assert given.isfinite() and torch.equal(given, expected)
    plain = ProcessConfig(schedule="flow", prediction="noise")
    given, expected = (diffusion_loss(network, X0, plain, times=each, noise=NOISE) for each in (ends, inside))
    assert given != expected


@pytest.mark.parametrize("space", ["noise", "flow"])
def test_the_loss_is_computed_in_single_precision(space):
    """Whatever the network's: half precision would round squares of small errors away."""
    process = ProcessConfig(schedule="flow", prediction="noise", loss_space=space)
    half = diffusion_loss(lambda x, t: network(x, t).bfloat16(), X0, process, times=TIMES, noise=NOISE)
    same = diffusion_loss(lambda x, t: network(x, t).bfloat16().float(), X0, process, times=TIMES, noise=NOISE)
    assert torch.equal(half, same) and half.dtype == torch.float32


def test_loss_depends_on_the_generator_alone():
    process = ProcessConfig(time_distribution="logit_normal")
    losses = [diffusion_loss(network, X0, process, torch.Generator().manual_seed(seed)).item() for seed in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


def test_a_prediction_of_another_shape_is_refused():
    x0 = torch.randn(2, 3, 4, 4)
    with pytest.raises(InputError, match=r"must predict \(2, 3, 4, 4\) as x0 has, got \(2, 6, 4, 4\)"):
        diffusion_loss(lambda x, t: torch.cat([x, x], dim=1), x0, ProcessConfig())
