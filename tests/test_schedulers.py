"""Processes as schedulers of diffusers, and its schedulers on data whose images are known."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from helpers.gaussian import MEAN, STD, gaussian_denoiser

from uvit.common.errors import InputError
from uvit.config import ProcessConfig, SampleConfig
from uvit.diffusion.process import SCHEDULES, combine
from uvit.diffusion.samplers import sampling_times
from uvit.diffusion.solvers import SOLVERS
from uvit.integrations.schedulers import (
    DRAWING_FLOW,
    DRAWING_TABLES,
    WITHOUT_DATA,
    check_scheduler,
    make_scheduler,
    set_times,
)


@pytest.mark.parametrize(("schedule", "first"), [("ldm", 1), ("ddpm", 0), ("iddpm", 0)])
def test_times_of_a_table_are_those_of_the_network(schedule, first):
    """sample.py asks an ldm network at n, where diffusers counts n - 1, as ADM's networks do."""
    process = ProcessConfig(schedule=schedule, prediction="v")
    scheduler = make_scheduler(process)
    times = set_times(scheduler, process, 4)
    assert times == [1.0, 0.75, 0.5, 0.25]
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert [SCHEDULES[schedule].network_time(t) for t in times] == (scheduler.timesteps + first).tolist()


@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        ("ddpm", DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
        ("iddpm", DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_the_schedulers_of_adm_fit_its_processes_alone(schedule, scheduler):
    check_scheduler(scheduler, ProcessConfig(schedule=schedule, prediction="noise"))
    for other in {"ldm", "ddpm", "iddpm", "cosine"} - {schedule}:
        with pytest.raises(InputError, match=f"another table of alphas, expected the process of schedule '{other}'"):
            check_scheduler(scheduler, ProcessConfig(schedule=other, prediction="noise"))


def test_tables_that_diffusers_has_are_named():
    for schedule, expected in {"ldm": ("scaled_linear", 0.00085, 0.012), "ddpm": ("linear", 1e-4, 0.02)}.items():
        config = make_scheduler(ProcessConfig(schedule=schedule, prediction="noise")).config
        assert (config.beta_schedule, config.beta_start, config.beta_end) == expected
        assert config.trained_betas is None and config.num_train_timesteps == 1000


TABLES = [
    (schedule, prediction)
    for schedule in ("vp", "ldm", "ddpm", "iddpm", "cosine")
    for prediction in ("noise", "data", "v")
]


@pytest.mark.parametrize(("schedule", "prediction"), [*TABLES, ("flow", "flow"), ("flow", "noise")])
def test_a_saved_scheduler_holds_the_process(schedule, prediction, tmp_path):
    process = ProcessConfig(schedule=schedule, prediction=prediction)
    scheduler = make_scheduler(process, "unipc")
    scheduler.save_pretrained(tmp_path)
    again = UniPCMultistepScheduler.from_pretrained(tmp_path)
    check_scheduler(again, process)
    if schedule != "flow":
        t = torch.arange(1, len(again.alphas_cumprod) + 1, dtype=torch.float64) / 1000
        alpha, _ = SCHEDULES[schedule].alpha_sigma(t)
        torch.testing.assert_close(again.alphas_cumprod.double().sqrt(), alpha, rtol=0, atol=3e-4)
        torch.testing.assert_close(again.alphas_cumprod.double().sqrt()[:990], alpha[:990], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("fields", "sampler", "message"),
    [
        ({"schedule": "vp", "prediction": "flow"}, "ddim", "take 'noise', 'data' or 'v' on schedule 'vp'"),
        ({"schedule": "flow", "prediction": "v"}, "euler", "take 'noise', 'data' or 'flow' on schedule 'flow'"),
        (
            {"schedule": "ldm", "prediction": "v", "time_shift": 2.0},
            "ddim",
            "schedule 'flow', got time_shift 2 on 'ldm'",
        ),
        ({"schedule": "vp", "prediction": "v"}, "heun", "'vp' are ddim, dpmpp_2m, unipc, got sampler 'heun'"),
        ({}, "euler_maruyama", "'flow' are euler, heun, dpmpp_2m, unipc, got sampler 'euler_maruyama'"),
    ],
)
def test_processes_without_a_counterpart_in_diffusers_are_refused(fields, sampler, message):
    with pytest.raises(InputError, match=message):
        make_scheduler(ProcessConfig(**fields), sampler)


STOCHASTIC = (
    *("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "SASolverScheduler"),
)
PROCESSES = [("flow", "flow"), ("flow", "noise"), ("vp", "noise"), ("ddpm", "data"), ("ldm", "v")]
PROCESSES += [("iddpm", "noise"), ("cosine", "v"), ("cosine", "noise")]
NOISE = torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))


def gaussian(process, x, t):
    """Predicts exactly what a network should that knows the data."""
    schedule = SCHEDULES[process.schedule]
    return combine(process.prediction, *gaussian_denoiser(schedule)(x.double(), t), *schedule.at(t)).float()


def draw(scheduler, process, num_steps):
    check_scheduler(scheduler, process)
    times = set_times(scheduler, process, num_steps)
    x, seed = NOISE * getattr(scheduler, "init_noise_sigma", 1.0), torch.Generator().manual_seed(1)
    options = {"generator": seed} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep, t in zip(scheduler.timesteps, times):
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(gaussian(process, scaled, t), timestep, x, **options, return_dict=False)[0]
    return x


def draw_ddim(process, num_steps):
    schedule, times = SCHEDULES[process.schedule], sampling_times(process, SampleConfig(num_steps=num_steps))
    return SOLVERS["ddim"](gaussian_denoiser(schedule), NOISE, schedule, times)


@pytest.mark.parametrize(("schedule", "prediction"), PROCESSES)
@pytest.mark.filterwarnings("ignore")
def test_every_scheduler_of_diffusers_draws_right_images_or_is_refused(schedule, prediction):
    """Of Gaussian data, whose images are known: no worse than our own solver of order 1, in as many steps."""
    process = ProcessConfig(schedule=schedule, prediction=prediction)
    config, drew = make_scheduler(process).config, set()
    right = {num_steps: draw_ddim(process, num_steps) for num_steps in (1, 2, 5, 11, 13, 40)}
    exact = MEAN + STD * NOISE
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or not isinstance(getattr(diffusers, name), type):
            continue
        try:
            scheduler = getattr(diffusers, name).from_config(config)
        except (ImportError, ValueError, TypeError, AttributeError):
            continue  # it needs a package or arguments of its own
        for num_steps, expected in right.items():
            try:
                images = draw(scheduler, process, num_steps)
            except InputError:
                continue
            case = name, num_steps
            drew.add(name)
            assert abs(images.mean() - MEAN) < 0.05, case
            assert abs(images.std() - STD) < 1.25 * abs(expected.std() - STD) + 0.03, case
            if name not in STOCHASTIC:
                assert (images - exact).abs().max() < 1.1 * (expected - exact).abs().max() + 0.1, case
    if schedule == "flow":
        expected = set(DRAWING_FLOW) if prediction == "flow" else {each for each in DRAWING_FLOW if "DPM" in str(each)}
        expected |= {UniPCMultistepScheduler}
    else:
        starts = SCHEDULES[schedule].singular_start
        options = {each: inspect.signature(each).parameters for each in DRAWING_TABLES}
        expected = set(DRAWING_TABLES) - set(WITHOUT_DATA if prediction == "data" else ())
        expected = {each for each in expected if not starts or "rescale_betas_zero_snr" in options[each]}
    assert drew == {each.__name__ for each in expected}


LDM = ProcessConfig(schedule="ldm", prediction="noise")


@pytest.mark.parametrize(
    ("process", "name", "options", "num_steps", "message"),
    [
        (LDM, "LCM", {}, 4, "LCMScheduler does not draw images of schedule 'ldm', expected one of DDIM, DDIMParallel"),
        (LDM, "DDIMInverse", {}, 4, "DDIMInverseScheduler does not draw images of schedule 'ldm'"),
        (ProcessConfig(), "DEISMultistep", {}, 4, "does not draw images of schedule 'flow', expected one of FlowMatch"),
        (
            ProcessConfig(schedule="ldm", prediction="data"),
            "PNDM",
            {},
            9,
            "PNDMScheduler takes networks that predict n",
        ),
        (LDM, "PNDM", {}, 3, "PNDMScheduler has no grid of 3 steps, take more: "),
        (LDM, "DDIM", {}, 400, "DDIMScheduler strides 2 entries a step, so that 400 steps cover 800 of 1000"),
        (LDM, "DDIM", {"timestep_spacing": "leading"}, 5, "begins 5 steps at time 0.801, where the image's share α is"),
        (LDM, "EulerDiscrete", {"timestep_spacing": "linspace"}, 1, "begins 1 steps at time 0.001"),
        (LDM, "DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, 5, "or noise is left in the images, got 'sig"),
        (
            ProcessConfig(schedule="cosine", prediction="v"),
            "HeunDiscrete",
            {},
            5,
            "HeunDiscreteScheduler cannot begin where α is 0, as on schedule 'cosine': make_scheduler gives",
        ),
        (
            ProcessConfig(schedule="cosine", prediction="v"),
            "EulerDiscrete",
            {"rescale_betas_zero_snr": False},
            5,
            "EulerDiscreteScheduler cannot begin where α is 0",
        ),
    ],
)
def test_schedulers_and_grids_that_leave_noise_are_refused(process, name, options, num_steps, message):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(make_scheduler(process).config, **options)
    with pytest.raises(InputError, match=message):
        draw(scheduler, process, num_steps)
