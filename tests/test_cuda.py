"""What only a CUDA device can show: `pytest -m gpu tests/test_cuda.py`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.golden import ARRAYS, golden_inputs, golden_model
from PIL import Image
from timm.utils import ModelEmaV3

from uvit import Config, UViT, build_network
from uvit.commands import sample, train
from uvit.config import OptimConfig, ProcessConfig, SampleConfig, TrainConfig, UNetConfig, UViTConfig, to_json
from uvit.data.batch import Batch
from uvit.diffusion.objective import diffusion_loss
from uvit.diffusion.process import SCHEDULES
from uvit.diffusion.samplers import ImageNoise
from uvit.diffusion.samplers import sample as draw
from uvit.networks.attention import attention, xformers_obstacle
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.runtime import compile_model
from uvit.training.optim import build_optimizer
from uvit.training.step import compute_gradients

pytestmark = pytest.mark.gpu
SMALL = UViTConfig(img_size=32, embed_dim=128, depth=4, num_heads=2, num_classes=3, null_class=True)
SMALL_UNET = UNetConfig(img_size=32, model_channels=64, channel_mult=(1, 2, 2), num_classes=3, null_class=True)
BOTH = pytest.mark.parametrize("config", [SMALL, SMALL_UNET], ids=["U-ViT", "U-Net"])


def built(config):
    """The network of a config, with weights that are not zero where a U-Net's begin at zero."""
    network = build_network(config)
    for parameter in network.parameters():
        if not parameter.any() and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return network.cuda()


def skip_without_kernel(backend, head_dim, dtype):
    if backend == "xformers" and (obstacle := xformers_obstacle(head_dim, dtype)):
        pytest.skip(f"xformers {obstacle}")


def error_of(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.fixture
def waits_are_errors():
    """Returns a switch: from then on, whatever makes the host wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_backends_equal_float64(backend, dtype, head_dim):
    skip_without_kernel(backend, head_dim, dtype)
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 257, 4, head_dim, device="cuda", dtype=dtype, requires_grad=True)
    exact = inputs.detach().double().requires_grad_()
    output, expected = attention(*inputs, backend), attention(*exact, "math")
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    assert error_of(output, expected) < tolerance
    weights = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad((output * weights).sum(), inputs)
    assert error_of(gradient, *torch.autograd.grad((expected * weights).sum(), exact)) < tolerance


@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
def test_memory_of_attention_grows_with_the_tokens(backend):
    skip_without_kernel(backend, 64, torch.bfloat16)
    peaks = []
    for tokens in (1024, 4096):
        inputs = torch.randn(3, 1, tokens, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*inputs, backend).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 5 * peaks[0]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_auto_runs_in_every_precision(dtype, config):
    model = build_network(config).to("cuda", dtype)
    x, y = torch.randn(2, 3, 32, 32, device="cuda", dtype=dtype), torch.tensor([0, 3], device="cuda")
    assert model(x, torch.tensor(500.0, device="cuda"), y).dtype == dtype


@pytest.mark.parametrize("backend", ["auto", "sdpa", "math"])
def test_golden(backend):
    reference = golden_model("tiny_class")
    model = UViT(reference.config, attention=backend)
    model.load_state_dict(reference.state_dict())
    inputs = {name: value.cuda() for name, value in golden_inputs("tiny_class").items()}
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):  # its convolutions are in TF32
        output = model.cuda()(**inputs)
    assert error_of(output.cpu(), torch.from_numpy(ARRAYS["tiny_class/output"])) < 1e-4


@pytest.mark.parametrize(
    ("how", "checkpointing"), [("no", False), ("no", True), ("blocks", False), ("blocks", True), ("graphs", False)]
)
@BOTH
def test_bf16_equals_float64(how, checkpointing, config):
    torch.manual_seed(0)
    model = built(dataclasses.replace(config, gradient_checkpointing=checkpointing))
    x, timesteps = torch.randn(4, 3, 32, 32, device="cuda"), torch.linspace(0, 999, 4, device="cuda")
    y = torch.tensor([0, 1, 2, 3], device="cuda")
    exact = built(model.config).double()
    exact.load_state_dict(model.state_dict())
    expected = exact(x.double(), timesteps.double(), y)
    expected.square().mean().backward()

    compile_model(model, how)
    for _ in range(3):  # CUDA graphs are recorded in the second call
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            output = model(x, timesteps, y).float()
        output.square().mean().backward()
    assert error_of(output.detach(), expected.detach()) < 3e-2
    found, wanted = (torch.cat([p.grad.flatten() for p in each.parameters()]) for each in (model, exact))
    assert error_of(found, wanted) < 5e-2


def network(x, timesteps):
    return x * timesteps[:, None, None, None]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_loss_is_drawn_on_the_device(name, waits_are_errors):
    x0, generator = torch.randn(4, 3, 8, 8, device="cuda"), torch.Generator("cuda").manual_seed(0)
    process = ProcessConfig(schedule=name)
    first = diffusion_loss(network, x0, process, generator)  # tables go to the device once
    waits_are_errors()
    second = diffusion_loss(network, x0, process, generator)
    torch.cuda.set_sync_debug_mode("default")
    assert first.device.type == "cuda" and first != second


@BOTH
@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(optim, config, waits_are_errors):
    config = Config(
        model=config, optim=OptimConfig(name=optim, grad_clip=1.0), train=TrainConfig(batch_size=4, label_dropout=0.5)
    )
    accelerator = Accelerator(mixed_precision="bf16")
    model = built(config.model)
    ema = ModelEmaV3(model, decay=0.9)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda")
    batches = itertools.repeat(Batch(images, torch.tensor([0, 1, 2, 0], device="cuda"), []))
    generator, losses = torch.Generator("cuda"), []
    for step in range(4):
        if step == 2:
            waits_are_errors()
        loss, _ = compute_gradients(accelerator, prepared, config, NO_ENCODERS, batches, generator, step)
        optimizer.step()
        ema.update(model)
        optimizer.zero_grad()
        losses.append(loss)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@BOTH
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_maruyama"])
def test_sampling_never_waits_for_the_device(solver, config, waits_are_errors):
    device, process = torch.device("cuda"), ProcessConfig(schedule="vp", prediction="noise")
    sampling = SampleConfig(sampler=solver, num_steps=4, guidance=2.0)
    model, y = built(config).eval(), torch.tensor([0, 1], device=device)
    noises = [ImageNoise([(0, 0), (0, 1)], (3, 32, 32), device) for _ in range(2)]
    arguments = {"y": y}, {"y": torch.full_like(y, 3)}
    first = draw(model, process, sampling, noises[0], *arguments)
    waits_are_errors()
    second = draw(model, process, sampling, noises[1], *arguments)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize(("precision", "how"), [("bf16", "graphs"), ("fp16", "no")])
def test_a_run_trains_resumes_and_draws(precision, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(
        Config(), model=UViTConfig(img_size=8, in_chans=1, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    )
    (tmp_path / "tiny.json").write_text(to_json(config))
    common = ["tiny.json", "--train.batch_size", "8", "--train.mixed_precision", precision, "--train.compile", how]
    common += ["--train.tracker", "none", "--train.run_dir", "run", "--sample.num_steps", "4"]
    for steps in ("4", "8"):
        train.main([*common, "--train.num_steps", steps])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8 and all(math.isfinite(line["loss"]) for line in lines)
    drawn = []
    for compiled in ("no", "graphs"):
        path = f"{compiled}.png"
        sample.main(["--checkpoint", "run", "--num_per_class", "2", "--compile", compiled, "--output", path])
        drawn.append(np.asarray(Image.open(path), dtype=float))
    assert np.abs(drawn[0] - drawn[1]).mean() < 2
