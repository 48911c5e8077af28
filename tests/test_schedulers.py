from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler

from uvit.common.errors import InputError
from uvit.config import ProcessConfig
from uvit.diffusion.process import SCHEDULES
from uvit.integrations.diffusers import check_scheduler, make_scheduler, set_times


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
