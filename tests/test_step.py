"""Our pieces of a training step against a plain reimplementation of the paper's."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from uvit import Config, UViT
from uvit.common.errors import InputError, TrainingError
from uvit.config import DataConfig, OptimConfig, ProcessConfig, TrainConfig, UViTConfig
from uvit.data.batch import Batch
from uvit.diffusion.objective import diffusion_loss
from uvit.networks.encoders import NO_ENCODERS, Encoders
from uvit.training.optim import build_optimizer, build_schedule
from uvit.training.step import (
    Lookahead,
    batches_on_device,
    compute_gradients,
    mean_over_processes,
    step_seed,
    training_loss,
)
from uvit.weights.published import ADAMW, LDM_NOISE, VP_NOISE

STEPS, WARMUP, DECAY = 5, 3, 0.9


def plain_training(model, batches, schedule):
    """The paper's loop with nothing but tensors: noise prediction, AdamW, linear warm-up from 0, EMA."""
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    losses, (beta1, beta2) = [], ADAMW.betas
    for step, (x0, times, noise) in enumerate(batches):
        alpha, sigma, network_time = schedule(times)
        x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
        loss = ((model(x_t, network_time) - noise) ** 2).mean()
        grads = torch.autograd.grad(loss, parameters)
        lr = ADAMW.lr * min(step / WARMUP, 1.0)
        with torch.no_grad():
            for p, g, m, v, average in zip(parameters, grads, first, second, ema):
                m.mul_(beta1).add_(g, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
                p.mul_(1 - lr * ADAMW.weight_decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
                average.mul_(DECAY).add_(p, alpha=1 - DECAY)
        losses.append(loss.item())
    return losses, parameters, ema


def vp(times):
    log_alpha = -times * 0.1 / 2 - times**2 * 19.9 / 4
    return log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt(), 999 * times


def ldm(times):
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    steps = (1000 * times).round().long()
    cumulative = (1 - betas).cumprod(0)[steps - 1]
    return cumulative.sqrt().float(), (1 - cumulative).sqrt().float(), steps.float()


@pytest.mark.parametrize(("process", "schedule"), [(VP_NOISE, vp), (LDM_NOISE, ldm)])
def test_five_steps_equal_a_plain_reimplementation(tiny, process, schedule):
    torch.manual_seed(0)
    model = UViT(tiny)
    reference, before = copy.deepcopy(model), copy.deepcopy(model)
    times = [torch.tensor([0.004, 0.25, 0.5, 0.999]) for _ in range(STEPS)]
    batches = [(torch.randn(4, 1, 8, 8), t, torch.randn(4, 1, 8, 8)) for t in times]

    config = dataclasses.replace(ADAMW, warmup_steps=WARMUP)
    optimizer = build_optimizer(model, config)
    set_learning_rate = build_schedule(optimizer, config, STEPS)
    ema = ModelEmaV3(model, decay=DECAY)
    losses = []
    for step, (x0, t, noise) in enumerate(batches):
        loss = diffusion_loss(model, x0, process, times=t, noise=noise)
        loss.backward()
        set_learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        losses.append(loss.item())
        if step == 0:  # the first update of a warm-up has learning rate 0
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))

    expected, weights, average = plain_training(reference, batches, schedule)
    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(model.parameters(), weights):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    for ours, theirs in zip(ema.module.parameters(), average):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    assert not torch.equal(model.mid_block.attn.proj.weight, before.mid_block.attn.proj.weight)


class Recorder(torch.nn.Module):
    """A network that keeps what it was called with."""

    def forward(self, x, timesteps, y=None, context=None):
        self.x, self.timesteps, self.y, self.context = x, timesteps, y, context
        return torch.zeros_like(x)


def call_of(config, seed, batch=400):
    recorder, generator = Recorder(), torch.Generator().manual_seed(seed)
    ramp = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(batch, -1, -1, -1)
    items = Batch(ramp, torch.arange(batch) % 10, [])
    loss = training_loss(recorder, config, NO_ENCODERS, items, generator)
    return recorder, loss


DIGITS = UViTConfig(img_size=8, in_chans=1, num_classes=10, null_class=True)


def test_labels_are_dropped_at_the_asked_rate_and_only_to_the_null_class():
    config = Config(model=DIGITS, train=TrainConfig(label_dropout=0.25))
    recorder, _ = call_of(config, 0)
    dropped = recorder.y != torch.arange(400) % 10
    assert set(recorder.y[dropped].tolist()) == {10}
    assert 70 < dropped.sum() < 130
    recorder, _ = call_of(Config(model=DIGITS), 0)
    assert torch.equal(recorder.y, torch.arange(400) % 10)


def test_dropped_captions_become_the_empty_one():
    def encode(captions):  # in the place of CLIP: one token that tells the caption's length
        return torch.tensor([[[float(len(caption))]] for caption in captions])

    model = UViTConfig(img_size=8, in_chans=1, context_dim=1, num_context_tokens=1)
    config = Config(model=model, train=TrainConfig(label_dropout=0.25))
    batch = Batch(torch.zeros(400, 1, 8, 8, dtype=torch.uint8), torch.zeros(400), [["ab"], ["abcd"]] * 200)
    recorder = Recorder()
    training_loss(recorder, config, Encoders(encode), batch, torch.Generator().manual_seed(0))
    dropped = recorder.context[:, 0, 0] == 0
    assert 70 < dropped.sum() < 130 and recorder.context.shape == (400, 1, 1)
    assert torch.equal(recorder.context[~dropped], encode([text for (text,) in batch.captions])[~dropped])


def test_randomness_comes_from_the_generator_only():
    config = Config(model=DIGITS, train=TrainConfig(label_dropout=0.5))
    (first, loss), (again, same), (other, _) = (call_of(config, seed) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x) and torch.equal(first.y, again.y) and loss == same
    for name in ("x", "timesteps", "y"):
        assert not torch.equal(getattr(first, name), getattr(other, name)), name


def test_flips_reach_the_network():
    """At times near 0 the noisy image is the image, so its left and right halves tell which way it lies."""
    process = ProcessConfig(time_distribution="logit_normal", logit_mean=-20.0)
    for flip in (False, True):
        recorder, _ = call_of(Config(model=DIGITS, process=process, data=DataConfig(flip=flip)), 0)
        mirrored = (recorder.x[..., 0] > recorder.x[..., -1]).all(dim=(1, 2))
        assert (150 < mirrored.sum() < 250) if flip else not mirrored.any()


def test_every_step_part_and_process_has_its_own_seed():
    numbers = [*itertools.product(range(3), range(20), range(2), range(2))]  # seed, step, part, process
    seeds = {step_seed(*each) for each in numbers}
    assert len(seeds) == len(numbers) and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3) != step_seed(1, 3, 2)


BATCH = Batch(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 2]), [])


def test_batches_come_on_the_device_and_skipped_images_are_reported(tmp_path, capsys):
    loader = [BATCH, BATCH._replace(skipped=["image 3"]), BATCH._replace(skipped=["image 3"])]
    batches = batches_on_device(torch.device("meta"), loader, tmp_path)
    assert all(next(batches).images.is_meta for _ in range(3))
    assert (tmp_path / "skipped.txt").read_text() == "image 3\n" and capsys.readouterr().err == "skipped: image 3\n"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (
            RuntimeError("DataLoader worker (pid 7)\nis killed"),
            TrainingError,
            r"^DataLoader worker \(pid 7\) is killed: run",
        ),
        (RuntimeError("something else"), RuntimeError, "^something else$"),
        (InputError("no such image"), InputError, "^no such image$"),
    ],
)
def test_errors_of_a_loader(error, raised, message, tmp_path):
    def loader():
        yield BATCH
        raise error

    batches = batches_on_device(torch.device("cpu"), loader(), tmp_path)
    next(batches)
    with pytest.raises(raised, match=message):
        next(batches)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(tiny, clip):
    """With a loss of one's own, which sees each part once; the norm is that before they are clipped."""
    model, accelerator, seen = UViT(tiny), Accelerator(cpu=True), []
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    parts = [BATCH._replace(images=images[start : start + 2]) for start in (0, 2, 4)]

    def loss_of(network, config, encoders, batch, generator):
        seen.append((len(batch.images), torch.rand(1, generator=generator).item()))
        return network(batch.images / 127.5 - 1, torch.tensor(500.0)).square().mean()

    expected = model(images / 127.5 - 1, torch.tensor(500.0)).square().mean()
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    norm = torch.cat([each.flatten() for each in gradients]).norm()
    settings = TrainConfig(batch_size=6, accumulation_steps=3)
    config = Config(model=tiny, train=settings, optim=OptimConfig(grad_clip=clip))
    generator = torch.Generator()
    loss, grad_norm = compute_gradients(accelerator, model, config, NO_ENCODERS, iter(parts), generator, 4, loss_of)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad_norm, norm)
    assert [count for count, _ in seen] == [2, 2, 2] and len({drawn for _, drawn in seen}) == 3
    scale = clip / norm if clip else 1.0
    for parameter, gradient in zip(model.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient * scale, rtol=1e-4, atol=1e-6)


def test_the_mean_over_one_process():
    found = mean_over_processes(Accelerator(cpu=True), torch.tensor(2.0), torch.tensor(3.0), 15)
    assert found == (2.0, 3.0, 15)


def test_a_batch_that_is_fetched_ahead_is_the_next_one_and_fails_when_it_is_needed():
    taken = []

    def batches():
        for number in (1, 2):
            taken.append(number)
            yield number
        raise TrainingError("a worker died")

    ahead = Lookahead(batches())
    ahead.fetch()
    ahead.fetch()
    assert taken == [1]
    assert next(ahead) == 1 and taken == [1]
    assert next(ahead) == 2
    ahead.fetch()
    with pytest.raises(TrainingError, match="a worker died"):
        next(ahead)
    assert list(ahead) == []
