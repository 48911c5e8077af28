from __future__ import annotations

import pytest
import torch

from uvit.common.errors import InputError
from uvit.config import ProcessConfig
from uvit.diffusion.objective import diffusion_loss
from uvit.diffusion.process import SCHEDULES, combine

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
