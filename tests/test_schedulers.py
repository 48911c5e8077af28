"""Processes as schedulers of diffusers, and its schedulers on data whose images are known."""

from __future__ import annotations

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
from uvit.integrations.scheduler_steps import run_scheduler, set_times
from uvit.integrations.schedulers import check_scheduler, make_scheduler


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


ANCESTRAL = "DDPM DDPMParallel EulerAncestralDiscrete"
WITHOUT_DATA = ("EulerAncestralDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM")
ALL = (
    f"{ANCESTRAL} DDIM DDIMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerDiscrete HeunDiscrete "
    "KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver UniPCMultistep"
)
NOISE = torch.randn(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))


def gaussian(process, x, t):
    """Predicts exactly what a network should that knows the data."""
    schedule = SCHEDULES[process.schedule]
    return combine(process.prediction, *gaussian_denoiser(schedule)(x.double(), t), *schedule.at(t)).float()


def draw(scheduler, process, num_steps):
    check_scheduler(scheduler, process, num_steps=num_steps)
    times = set_times(scheduler, process, num_steps)
    seed = torch.Generator().manual_seed(1)
    return run_scheduler(scheduler, times, lambda x, t: gaussian(process, x, t), NOISE, seed)


def draw_ddim(process, num_steps):
    schedule, times = SCHEDULES[process.schedule], sampling_times(process, SampleConfig(num_steps=num_steps))
    return SOLVERS["ddim"](gaussian_denoiser(schedule), NOISE, schedule, times)


DRAWING = {
    "flow flow": "DPMSolverMultistep DPMSolverSinglestep FlowMatchEulerDiscrete FlowMatchHeunDiscrete UniPCMultistep",
    "flow noise": "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep",
    "vp noise": ALL,
    "ddpm data": " ".join(name for name in ALL.split() if name not in WITHOUT_DATA),
    "iddpm noise": ALL.replace("PNDM ", ""),
    "cosine v": f"{ANCESTRAL} DDIM DDIMParallel DPMSolverMultistep EulerDiscrete UniPCMultistep",
}
"""The schedulers of diffusers that draw right images in some numbers of steps, by schedule and prediction."""


@pytest.mark.parametrize("case", DRAWING)
@pytest.mark.filterwarnings("ignore")
def test_every_scheduler_of_diffusers_draws_right_images_or_is_refused(case):
    """Of Gaussian data, whose images are known: no worse than our own solver of order 1, in as many steps."""
    schedule, prediction = case.split()
    process = ProcessConfig(schedule=schedule, prediction=prediction)
    config, drew = make_scheduler(process).config, set()
    right = {num_steps: draw_ddim(process, num_steps) for num_steps in (1, 2, 5, 11, 40)}
    for name in dir(diffusers):
        if not name.endswith("Scheduler") or not isinstance(getattr(diffusers, name), type):
            continue
        try:
            scheduler = getattr(diffusers, name).from_config(config)
        except (ImportError, ValueError, TypeError, AttributeError):
            continue  # it needs a package or arguments of its own
        for num_steps, expected in right.items():
            if is_right(scheduler, process, num_steps, expected):
                drew.add(name.removesuffix("Scheduler"))
    assert drew == set(DRAWING[case].split())


def is_right(scheduler, process, num_steps, expected) -> bool:
    """Whether a scheduler is accepted; what it draws then is as right as what is expected."""
    try:
        images = draw(scheduler, process, num_steps)
    except InputError:
        return False
    name, exact = type(scheduler).__name__.removesuffix("Scheduler"), MEAN + STD * NOISE
    assert abs(images.mean() - MEAN) < 0.06, (name, num_steps)
    assert abs(images.std() - STD) < 1.3 * abs(expected.std() - STD) + 0.06, (name, num_steps)
    if name not in f"{ANCESTRAL} KDPM2AncestralDiscrete SASolver".split():
        assert (images - exact).abs().max() < 1.1 * (expected - exact).abs().max() + 0.15, (name, num_steps)
    return True


LDM, COSINE = (ProcessConfig(schedule=schedule, prediction="v") for schedule in ("ldm", "cosine"))
FLOW = ProcessConfig(schedule="flow", prediction="flow")


@pytest.mark.parametrize(
    ("process", "name", "options", "num_steps", "message"),
    [
        (LDM, "LCM", {}, 4, "LCMScheduler does not draw right images in 111 steps, "),
        (LDM, "LCM", {"original_inference_steps": 200}, 4, "of data with mean 0.3 and standard deviation 0.5 got 0."),
        (LDM, "DDIMInverse", {}, 4, r"got .* and 2: make_scheduler gives schedulers that do"),
        (FLOW, "DEISMultistep", {}, 40, "in 111 steps, noise of standard deviation 0.0089 is left in them: make_s"),
        (LDM, "PNDM", {}, 3, "in 3 steps, but ends with ValueError: operands could not be broadcast"),
        (LDM, "DDIM", {}, 400, "DDIMScheduler does not draw right images in 400 steps, of data with mean 0.3"),
        (LDM, "DDIM", {"timestep_spacing": "leading"}, 1, "in 1 steps, of data with mean 0.3"),
        (LDM, "DDIM", {"timestep_spacing": "linspace"}, 2, "in 2 steps, of data with mean 0.3"),
        (LDM, "EulerDiscrete", {"timestep_spacing": "linspace"}, 1, "in 1 steps, of data with mean 0.3"),
        (LDM, "DDPM", {"variance_type": "fixed_large"}, 20, "in 111 steps, noise of standard deviation"),
        (LDM, "UniPCMultistep", {"solver_type": "bh1"}, 20, "got nan and nan"),
        (LDM, "UniPCMultistep", {"lower_order_final": False}, 20, "got nan and nan"),
        (LDM, "HeunDiscrete", {"timestep_spacing": "linspace"}, 2, "in 2 steps, of data with"),
        (LDM, "DDPM", {"variance_type": "learned_range"}, 20, "in 111 steps, but ends with TypeError"),
        (COSINE, "HeunDiscrete", {}, 5, "HeunDiscreteScheduler does not draw right images in 111 steps"),
        (COSINE, "EulerDiscrete", {"rescale_betas_zero_snr": False}, 5, "got nan and nan"),
        (ProcessConfig(schedule="ldm", prediction="data"), "PNDM", {}, 9, "given as sample must be one of `epsilon`"),
    ],
)
def test_schedulers_and_grids_that_draw_other_images_are_refused(process, name, options, num_steps, message):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(make_scheduler(process).config, **options)
    with pytest.raises(InputError, match=message):
        draw(scheduler, process, num_steps)


@pytest.mark.parametrize(
    ("name", "options", "num_steps"),
    [
        ("DDIM", {"timestep_spacing": "leading"}, 150),
        ("DDIM", {"timestep_spacing": "leading", "steps_offset": 1}, 50),
        ("DDIM", {"clip_sample": True}, 20),
        ("DDIM", {"set_alpha_to_one": False}, 20),
        ("EulerDiscrete", {"timestep_spacing": "linspace"}, 20),
        ("EulerDiscrete", {"use_karras_sigmas": True}, 20),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 40),
        ("DPMSolverMultistep", {"solver_order": 3}, 20),
        ("DPMSolverMultistep", {"thresholding": True}, 20),
    ],
)
def test_options_that_draw_right_images_are_accepted(name, options, num_steps):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(make_scheduler(LDM).config, **options)
    check_scheduler(scheduler, LDM, num_steps=num_steps)


def test_a_trial_stays_on_the_cpu_and_leaves_random_numbers_alone():
    """Whatever the default device is: as `meta`, which has no values, a GPU would be."""
    scheduler, before = make_scheduler(LDM, "ddim"), torch.get_rng_state()
    with torch.device("meta"):
        check_scheduler(scheduler, LDM, num_steps=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_steps_than_entries_of_a_table_are_tried_with_as_many():
    check_scheduler(make_scheduler(FLOW, "dpmpp_2m"), FLOW, num_steps=1001)
    check_scheduler(make_scheduler(FLOW, "euler"), FLOW, num_steps=1500)
