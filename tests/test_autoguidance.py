"""Guidance away from a worse network, from the formula to the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import refused
from helpers.edited import edit_json
from helpers.runs import TINY, TINY_AVERAGE

from uvit import Config, UViT, UViTConfig
from uvit.commands import evaluate, sample, train
from uvit.common.errors import InputError
from uvit.config import SampleConfig, load_config
from uvit.diffusion.process import SCHEDULES
from uvit.diffusion.samplers import ImageNoise, guide
from uvit.networks.encoders import NO_ENCODERS
from uvit.sampling.generate import decode_images, generate
from uvit.sampling.runs import load_run
from uvit.training.checkpoint import load_checkpoint
from uvit.weights.build import build_network
from uvit.weights.tensors import write_weights

CPU = torch.device("cpu")
MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3)
CONFIG = Config(model=MODEL, sample=SampleConfig(num_steps=4, sampler="euler", t_end=0.01))
LABELS = [0, 1, 1, 2]


def network(seed: int) -> UViT:
    """A network that says something."""
    torch.manual_seed(seed)
    model = UViT(MODEL)
    torch.nn.init.normal_(model.decoder_pred.weight, std=0.3)
    return model.eval()


def with_guidance(scale: float, **fields) -> Config:
    return dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, guidance=scale, **fields))


def recording(seen, factor, channels=1):
    """A linear network that keeps what it is called with, with channels of its own after those of x."""

    def call(x, timesteps, y, interval=None):
        seen.append((len(x), timesteps.tolist(), y.tolist(), None if interval is None else interval.tolist()))
        return torch.cat([x * factor + y[:, None]] * channels, dim=1)

    return call


def test_it_is_the_formula_of_two_calls():
    good, bad, x = [], [], torch.randn(3, 4)
    cond, uncond = {"y": torch.tensor([1.0, 2.0, 3.0])}, {"y": torch.tensor([4.0, 5.0, 6.0])}
    output = guide(recording(good, 2), SCHEDULES["flow"], cond, uncond, 1.5, (0.2, 0.7), recording(bad, 3, 2))
    strong, weak = x * 2 + cond["y"][:, None], x * 3 + uncond["y"][:, None]
    torch.testing.assert_close(output(x, 0.5), weak + 1.5 * (strong - weak))
    torch.testing.assert_close(output(x, 0.6, 0.4), weak + 1.5 * (strong - weak))
    torch.testing.assert_close(output(x, 0.8), strong)
    assert good == [
        (3, [500.0] * 3, [1, 2, 3], None),
        (3, [600.0] * 3, [1, 2, 3], pytest.approx([200.0] * 3)),
        (3, [800.0] * 3, [1, 2, 3], None),
    ]
    assert bad == [(3, times, [4, 5, 6], interval) for _, times, _, interval in good[:2]]  # none outside the interval


def test_a_network_led_away_from_itself_draws_as_without_guidance():
    model = network(0)
    plain = generate(model, with_guidance(1.0), LABELS, 0)
    led = generate(model, with_guidance(3.0), LABELS, 0, weak=model)
    assert (led.int() - plain.int()).abs().max() <= 1 and plain.float().std() > 10


@pytest.mark.parametrize("reuse", ["none", "1:2"])
def test_images_are_those_of_a_plain_loop(reuse):
    """Euler's steps written out, of a model without a null class."""
    good, bad = network(0), network(1)
    config = with_guidance(2.0)
    images = generate(good, with_guidance(2.0, reuse=reuse), LABELS, 5, weak=bad)
    times = [1.0, 0.7525, 0.505, 0.2575, 0.01]
    x = ImageNoise([(5, 0, 0), (5, 1, 0), (5, 1, 1), (5, 2, 0)], (1, 8, 8), CPU)()
    y = torch.tensor(LABELS)
    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            timesteps = torch.full((4,), 1000 * t)
            away = bad(x, timesteps, y)
            x = x + (s - t) * (away + 2 * (good(x, timesteps, y) - away))
    difference = (images.int() - decode_images(x, NO_ENCODERS).int()).abs()
    if reuse == "none":
        assert difference.max() <= 1
    else:  # which extrapolates between evaluations of the model, and leaves the other as it is
        assert difference.max() > 1 and difference.float().mean() < 30
    assert (generate(good, with_guidance(1.0), LABELS, 5).int() - images.int()).abs().max() > 10
    with pytest.raises(InputError, match=r"guidance 2.0 needs a model with a null class, got one without"):
        generate(good, config, LABELS, 5)


def test_guidance_as_an_input_excludes_it():
    cond = {"y": torch.ones(3), "guidance": torch.ones(3, 3)}
    with pytest.raises(InputError, match="guidance is either among the conditions or by two passes, got both"):
        guide(recording([], 2), SCHEDULES["flow"], cond, cond, 2.0, weak=recording([], 3))


def test_a_checkpoint_stands_for_the_average_in_it(workdir, tmp_path):
    folder = Path("runs/tiny/checkpoints/step_00000002")
    config, model = load_run(str(folder), "auto", CPU)
    expected = torch.load(folder / "training_state.pt")["ema"]
    for found in (model, UViT.from_pretrained(folder)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert config == load_run("runs/tiny", "auto", CPU)[0]
    newest = load_run("runs/tiny/checkpoints/step_00000004", "auto", CPU)[1].state_dict()
    assert all(torch.equal(tensor, newest[name]) for name, tensor in load_checkpoint(Path("runs/tiny"))["ema"].items())

    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "training_state.pt").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"broken is not a complete checkpoint \(its training_state.pt is not what"):
        UViT.from_pretrained(broken)


def drawn(arguments: str) -> np.ndarray:
    sample.main(f"--checkpoint runs/tiny --num_per_class 2 --output drawn.npz {arguments}".split())
    return np.load("drawn.npz")["arr_0"].astype(int)


def test_the_commands_lead_away_from_a_checkpoint(workdir, capsys):
    guide = "runs/tiny/checkpoints/step_00000002"
    plain, led, null = (
        drawn(words) for words in ("--guidance 1", f"--guidance 30 --guide {guide}", "--guidance 30 --guide runs/tiny")
    )
    assert f"guidance w = 30 (the paper's s = 29) away from {guide}, dpmpp_2m" in capsys.readouterr().out
    assert abs(led - plain).max() > 1
    assert abs(null - plain).max() <= 1  # away from itself
    evaluate.main(f"--checkpoint runs/tiny --num_images 20 --guidance 2 --guide {guide} --output led.json".split())
    said = json.loads(Path("led.json").read_text())["protocol"]
    assert said["guidance"].startswith(f"w = 2 (the paper's s = 1) away from {guide}, hash ")


def test_a_run_without_a_null_class_can_be_led_away(workdir, monkeypatch, capsys):
    options = "--model.null_class False --train.label_dropout 0 --sample.guidance 1 --train.run_dir runs/bare"
    train.main(["tiny.py", *options.split(), "--train.tracker", "none"])
    sample.main("--checkpoint runs/bare --guidance 2 --guide runs/tiny --output bare.png".split())  # of another depth
    assert "away from runs/tiny" in capsys.readouterr().out
    line = refused("sample", "--checkpoint runs/bare --guidance 2 --output bare.png", monkeypatch, capsys)
    assert line == "error: sample.guidance 2.0 needs model.null_class, got False"


@pytest.fixture
def others(runs, monkeypatch):
    """A run beside others that differ in one field, by its name."""
    monkeypatch.chdir(runs.parent)
    changes = {"in_chans": 3, "img_size": 4, "num_classes": 9, "schedule": "cosine", "prediction": "v"}
    for name, value in {**changes, "time_scale": 3.0}.items():
        folder = Path(shutil.copytree(runs / "tiny", runs / name))
        section = "model" if name in ("in_chans", "img_size", "num_classes") else "process"
        edit_json(folder / "config.json", data__class_names=[], **{f"{section}__{name}": value})
        write_weights(folder, build_network(load_config(folder / "config.json").model).state_dict())
    return runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--guidance 2 --guide runs/in_chans", "--guide runs/in_chans must have model.in_chans 1, got 3"),
        ("--guidance 2 --guide runs/img_size", "--guide runs/img_size must have model.image_shape (8, 8), got (4, 4)"),
        ("--guidance 2 --guide runs/num_classes", "--guide runs/num_classes must have model.num_classes 10, got 9"),
        ("--guidance 2 --guide runs/schedule", "--guide runs/schedule must have process.schedule flow, got cosine"),
        ("--guidance 2 --guide runs/prediction", "--guide runs/prediction must have process.prediction flow, got v"),
        ("--guidance 2 --guide runs/time_scale", "--guide runs/time_scale must have process.time_scale 1000, got 3"),
        ("--guidance 1 --guide runs/tiny", "--guide has no effect with guidance 1, got runs/tiny: give --guidance"),
        ("--guidance 2 --guide runs/tiny/model.safetensors", "expected a run: name its run, or a checkpoint of one"),
        ("--guidance 2 --guide nowhere", "checkpoint not found: nowhere"),
        ("--guidance 2 --guide runs", "cannot read runs/config.json"),
    ],
)
def test_a_run_that_does_not_fit_is_one_line(arguments, message, others, monkeypatch, capsys):
    assert message in refused("sample", f"--checkpoint runs/tiny {arguments} --output x.png", monkeypatch, capsys)
    assert not Path("x.png").exists()


def test_a_guide_must_know_what_the_solver_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fields = "model=replace(config.model, takes_interval=True), sample=replace(config.sample, sampler='average')"
    for name, share in (("good", 0.5), ("bad", 0.0)):
        process = f"replace(config.process, objective='average', instant_share={share})"
        lines = f"from dataclasses import replace\nconfig = replace(config, {fields}, process={process})\n"
        Path(f"{name}.py").write_text(TINY + lines)
        train.main([f"{name}.py", "--train.sample_every", "0"])
    capsys.readouterr()
    words = "--checkpoint runs/good --guide runs/bad --guidance 2 --sampler euler"
    assert "sampler must be one of average for" in refused("sample", words, monkeypatch, capsys)


def test_evaluation_has_no_guidance_by_default(others, monkeypatch, capsys):
    line = refused("evaluate", "--checkpoint runs/tiny --guide runs/tiny", monkeypatch, capsys)
    assert "--guide has no effect with guidance 1" in line
    line = refused("evaluate", "--images x.npz --reference y --guide runs/tiny", monkeypatch, capsys)
    assert "--guide is for images to draw from a --checkpoint" in line


def test_a_network_that_takes_guidance_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("average.py").write_text(TINY_AVERAGE)
    Path("tiny.py").write_text(TINY)
    for name in ("average.py", "tiny.py"):
        train.main([name, *"--train.num_steps 1 --train.sample_every 0 --train.tracker none".split()])
    capsys.readouterr()
    words = "--guidance 2 --guide runs/average --output x.png --checkpoint"
    line = refused("sample", f"{words} runs/average", monkeypatch, capsys)
    assert line == "error: --guide is for a network that takes no guidance itself, got runs/average"
    line = refused("sample", f"{words} runs/tiny", monkeypatch, capsys)
    assert line == "error: --guide runs/average must have process.objective instant, got average"
