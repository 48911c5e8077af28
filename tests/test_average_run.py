"""A run with an average velocity under the commands, and its start from another run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.commands import refused
from helpers.runs import TINY, TINY_AVERAGE, TINY_UNET, losses_of
from PIL import Image

from uvit import UViT
from uvit.commands import evaluate, export, sample, train
from uvit.common.errors import InputError
from uvit.config import AVERAGE_TIME_SCALE, load_config
from uvit.data.batch import Batch
from uvit.diffusion.average import DIFFERENCE_STEPS
from uvit.diffusion.samplers import ImageNoise
from uvit.integrations.export import load_exported
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.runtime import tf32
from uvit.sampling.generate import generate
from uvit.sampling.runs import load_run
from uvit.training.checkpoint import load_checkpoint
from uvit.training.initial import initial_network
from uvit.training.step import as_written, training_loss
from uvit.training.trainer import Trainer

AVERAGE_UNET = TINY_UNET + TINY_AVERAGE.removeprefix(TINY)
CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config file of a small run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("instant.py").write_text(TINY.replace("config = Config(", "config = Config(process=ProcessConfig(),"))
    Path("unet.py").write_text(AVERAGE_UNET)
    Path("small.py").write_text(TINY_AVERAGE)
    return "small.py"


def drawn(run_dir, **settings):
    """One image of each of five labels."""
    config, model = load_run(run_dir, "auto", CPU)
    return generate(
        model, dataclasses.replace(config, sample=dataclasses.replace(config.sample, **settings)), range(5), 0
    )


@pytest.mark.parametrize("name", ["small.py", "unet.py"])
def test_a_resumed_run_equals_an_uninterrupted_one(name, config):
    train.main([name])
    for steps in ("2", "4"):
        train.main([name, "--train.run_dir", "parts", "--train.num_steps", steps])
    parts, whole = load_checkpoint(Path("parts")), load_checkpoint(Path("runs", Path(name).stem))
    assert parts["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in whole[part].items())


def test_a_run_says_how_it_takes_derivatives(config, capsys):
    train.main([config])
    assert "forward derivatives are taken with attention 'math'" in capsys.readouterr().out
    train.main([config, "--model.attention", "math", "--train.run_dir", "math"])
    assert "forward derivatives" not in capsys.readouterr().out
    train.main([config, "--process.derivative", "differences", "--train.run_dir", "differences"])
    assert "forward derivatives" not in capsys.readouterr().out


def test_recomputed_blocks_change_nothing(config):
    train.main([config])
    train.main([config, "--train.run_dir", "recomputed", "--model.gradient_checkpointing", "True"])
    assert losses_of(Path("recomputed")) == losses_of(Path("runs/small"))


def test_a_batch_in_parts_trains(config):
    train.main([config, "--train.accumulation_steps", "2"])
    assert all(math.isfinite(loss) for loss in losses_of(Path("runs/small")))


@pytest.mark.parametrize("name", ["small.py", "unet.py"])
@pytest.mark.parametrize("derivative", ["forward", "differences"])
def test_a_run_in_bf16_is_nearly_the_same(name, derivative, config):
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(True)  # which remembers a precision
        options = ["--train.mixed_precision", precision, "--process.derivative", derivative]
        train.main([name, "--train.run_dir", precision, *options])
        losses.append(losses_of(Path(precision)))
    AcceleratorState._reset_state(True)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_forward_derivatives_are_in_fp32():
    network = torch.nn.Linear(4, 4)
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)  # as accelerate does
    x = torch.randn(2, 4)
    call = as_written(network)
    for _ in range(2):
        assert network(x).dtype == torch.bfloat16
        assert torch.equal(call(x), torch.nn.functional.linear(x, network.weight, network.bias))
    with pytest.raises(RuntimeError):
        call(torch.randn(2, 3))
    assert network(x).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["forward", "differences"])
def test_differences_are_in_the_runs_precision_without_tf32_and_forward_derivatives_without_autocast(how):
    class Network(torch.nn.Module):
        def forward(self, x):
            return (
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.allow_tf32,
                torch.is_autocast_enabled("cpu"),
            )

    network = Network()
    network.forward = torch.autocast("cpu", torch.bfloat16)(network.forward)
    with tf32():
        found = as_written(network, how)(torch.zeros(1))
        assert found == (("highest", False, True) if how == "differences" else ("high", True, False))
        assert network(torch.zeros(1)) == ("high", True, True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_differences_are_over_a_time_for_the_runs_precision(precision, config, monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, x, timesteps, **conditions):
            times.append(timesteps)
            return torch.zeros_like(x)

    times = []
    run = load_config(config)
    process = dataclasses.replace(run.process, derivative="differences")
    model = dataclasses.replace(run.model, takes_guidance=False)
    run = dataclasses.replace(
        run, model=model, process=process, train=dataclasses.replace(run.train, mixed_precision=precision)
    )
    monkeypatch.setattr("uvit.training.step.resolve_precision", lambda precision, *_: precision)  # CPUs have no fp16
    batch = Batch(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), [])
    training_loss(Network(), run, NO_ENCODERS, batch, torch.Generator().manual_seed(0))
    _, ahead, behind, _ = times
    step = AVERAGE_TIME_SCALE * DIFFERENCE_STEPS[precision]
    torch.testing.assert_close(ahead - behind, torch.full((2,), 2 * step), rtol=1e-4, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_a_compiled_run_is_nearly_the_same(how, config):
    train.main([config])
    train.main([config, "--train.run_dir", "compiled", "--train.compile", how])
    assert losses_of(Path("compiled")) == pytest.approx(losses_of(Path("runs/small")), rel=1e-4)


def test_the_commands_draw_in_one_evaluation_with_guidance(config, capsys):
    train.main([config])
    sample.main("--checkpoint runs/small --steps 1 --guidance 2 --output one.png".split())
    assert "guidance w = 2 (the paper's s = 1, in one pass), average, 1 steps" in capsys.readouterr().out
    assert Image.open("one.png").size
    evaluate.main("--checkpoint runs/small --num_images 20".split())
    assert "recognised " in capsys.readouterr().out


def test_guidance_is_an_input_of_one_evaluation(config):
    train.main([config])
    config, model = load_run("runs/small", "auto", CPU)
    seen = []
    model.register_forward_pre_hook(lambda _, given, named: seen.append((len(given[0]), named)), with_kwargs=True)
    sampling = dataclasses.replace(config.sample, num_steps=2, guidance=2.0, guidance_interval=(0.25, 0.75))
    generate(model, dataclasses.replace(config, sample=sampling), [3, 4, 5], 0)
    assert [batch for batch, _ in seen] == [3, 3]
    for _, named in seen:
        assert torch.equal(named["guidance"], torch.tensor([[2.0, 0.25, 0.75]]).expand(3, -1))
        assert named["interval"].tolist() == [1.5] * 3  # of the network's time, 3 t


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("evaluations", [1, 3])
def test_an_exported_file_draws_by_itself(evaluations, suffix, config, capsys):
    train.main([config])
    words = f"runs/small --evaluations {evaluations} --format {suffix} --output drawing.{suffix}"
    export.main(words.split())
    assert "noise (B, 1, 8, 8), y (B) (10 is no label), guidance (B, 3); at most" in capsys.readouterr().out
    noise = ImageNoise([(0, label, 0) for label in range(5)], (1, 8, 8), CPU)()
    guidance = torch.tensor([[2.0, 0.0, 1.0]]).expand(5, -1).contiguous()
    images = load_exported(Path(f"drawing.{suffix}"))(noise=noise, y=torch.arange(5), guidance=guidance)
    expected = drawn("runs/small", num_steps=evaluations, guidance=2.0)
    assert (((images + 1) * 127.5).round().clamp(0, 255) - expected.float()).abs().max() <= 1


def test_only_a_run_of_an_average_velocity_can_be_exported_to_draw(config, monkeypatch, capsys):
    train.main(["instant.py"])
    UViT.from_pretrained("runs/instant").save_pretrained("weights")
    capsys.readouterr()
    needs = "--evaluations needs a run with process.objective 'average', got"
    for source, got in (("runs/instant", "runs/instant with 'instant'"), ("weights", "weights")):
        line = refused("export", [source, "--evaluations", "1", "--output", "x.onnx"], monkeypatch, capsys)
        assert line == f"error: {needs} {got}"
    train.main([config, "--sample.sampler", "heun", "--sample.reuse", "1:2"])  # settings of another solver
    export.main("runs/small --evaluations 1 --format pt2 --output x.pt2".split())


def test_a_run_is_taken_on_with_new_inputs_as_if_absent(config):
    """Up to rounding; they fade in over the warm-up."""
    for name, old in (("small.py", "instant.py"), ("unet.py", None)):
        words = [] if old else ["--model.takes_interval", "False", "--model.takes_guidance", "False"]
        words += [] if old else ["--process.objective", "instant", "--sample.sampler", "dpmpp_2m"]
        train.main([old or name, "--process.time_scale", "3", "--train.run_dir", f"old_{name}", *words])
        now = load_config(name)
        now = dataclasses.replace(now, train=dataclasses.replace(now.train, init=f"old_{name}"))
        (network, num_absent), (_, before) = (
            initial_network(now, Path("new"), CPU),
            load_run(f"old_{name}", "auto", CPU),
        )
        network.eval()
        assert num_absent == (2 if name == "small.py" else 0)  # a U-Net adds them to its time
        x, y, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 10]), torch.tensor([0.3, 1.2, 2.9])
        guidance = torch.tensor([[3.0, 0.0, 1.0]]).expand(3, -1)
        with torch.no_grad():
            expected = before(x, t, y)
            found = network(x, t, y, interval=t / 2, guidance=guidance)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            network.fade_in(1.0, 2)
            assert name == "unet.py" or not torch.equal(network(x, t, y, interval=t / 2, guidance=guidance), expected)
        train.main([name, "--train.init", f"old_{name}"])
        whole = load_checkpoint(Path("runs", Path(name).stem))
        for steps in ("1", "3", "4"):  # in the middle of the warm-up, too, and no longer in need of the old run
            train.main(
                [name, "--train.init", f"old_{name}", "--train.run_dir", f"parts_{name}", "--train.num_steps", steps]
            )
        assert all(
            torch.equal(load_checkpoint(Path(f"parts_{name}"))["model"][key], each)
            for key, each in whole["model"].items()
        )


def test_a_grid_while_tokens_fade_in_is_drawn_with_the_average_of_the_same_presence(config):
    """And all of them are there after the warm-up."""
    train.main(["instant.py", "--process.time_scale", "3"])
    trainers = []

    def make_trainer(*arguments):
        trainers.append(Trainer(*arguments))
        return trainers[-1]

    words = ["--train.init", "runs/instant", "--train.num_steps"]
    for steps, presence in (("2", 0.5), ("4", None)):  # the presence of the last step, of a warm-up of 2
        train.main([config, *words, steps], make_trainer)
        for network in (trainers[-1].network, trainers[-1].average):
            found = network.mid_block.attn.presence
            assert found is None if presence is None else found.item() == presence
    images = generate(trainers[-1].average.eval(), trainers[-1].config, range(5), 0)
    assert torch.equal(images, drawn("runs/small"))


def test_only_what_is_lacking_starts_as_if_absent(config):
    """A guidance that is added to a run with an interval, whose own weights stay; nothing, to a run with both."""
    without = ["--model.takes_guidance", "False", "--sample.guidance", "1"]
    for name in ("small.py", "unet.py"):
        train.main([name, "--train.run_dir", f"interval_{name}", *without])
        for source, absent in ((f"interval_{name}", 1), (f"both_{name}", 0)):
            if not absent:
                train.main([name, "--train.run_dir", source])
            now = load_config(name)
            now = dataclasses.replace(now, train=dataclasses.replace(now.train, init=source))
            (network, num_absent), (_, before) = initial_network(now, Path("new"), CPU), load_run(source, "auto", CPU)
            assert num_absent == (absent if name == "small.py" else 0)
            x, y, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 10]), torch.tensor([0.3, 1.2, 2.9])
            guidance = torch.tensor([[3.0, 0.0, 1.0]]).expand(3, -1)
            given = {} if absent else {"guidance": guidance}
            with torch.no_grad():
                expected = before(x, t, y, interval=t / 2, **given)
                found = network.eval()(x, t, y, interval=t / 2, guidance=guidance)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            embeds = {key: each for key, each in before.state_dict().items() if key.startswith("interval_embed")}
            assert embeds and all(torch.equal(network.state_dict()[key], each) for key, each in embeds.items())


def test_weights_that_do_not_say_how_they_were_trained_are_taken_on_with_a_warning(config, capsys):
    UViT(load_config(config).model).save_pretrained("weights")
    train.main([config, "--train.init", "weights"])
    assert "train.init weights does not say how it was trained: its times must be those of this run, up to 3" in (
        capsys.readouterr().err
    )


def test_what_cannot_be_taken_on_is_refused(config, monkeypatch, capsys):
    train.main(["instant.py", "--process.time_scale", "3"])
    capsys.readouterr()
    shared = ["--train.init", "runs/instant", "--train.run_dir", "new"]
    for name, words, message in (
        (config, ["--model.embed_dim", "32"], "train.init runs/instant must have model.embed_dim 32, got 16"),
        (config, ["--process.time_scale", "5"], "train.init runs/instant must have process.time_scale 5, got 3"),
        (
            config,
            ["--process.prediction", "data"],
            "train.init runs/instant must have process.prediction data, got flow",
        ),
        (config, ["--train.init", "nothing"], "not found: nothing"),
        ("unet.py", [], "runs/instant has the weights of a U-ViT, expected those of a U-Net"),
    ):
        assert message in refused("train", [name, *shared, *words], monkeypatch, capsys)
        assert not Path("new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--process.time_scale", "0"], "time_scale must be None or above 0, got 0"),
        (["--process.schedule", "vp"], "schedule must be 'flow' with objective 'average', got 'vp'"),
        (
            ["--process.prediction", "noise"],
            "prediction must be 'flow' or 'data' with objective 'average', got 'noise'",
        ),
        (["--process.loss_space", "data"], "loss_space must be None with objective 'average', got 'data'"),
        (["--process.weighting", "min_snr"], "weighting must be 'none' with objective 'average', got 'min_snr'"),
        (["--process.instant_share", "1"], "instant_share must be in [0, 1), got 1"),
        (["--process.adaptive_power", "-1"], "adaptive_power must be at least 0, got -1"),
        (["--process.guidance_max", "1"], "guidance_max must be above 1, and at most 10,000, got 1"),
        (["--process.objective", "instant"], "model.takes_interval must be False with process.objective 'instant'"),
        (["--model.takes_interval", "False"], "model.takes_interval must be True with process.objective 'average'"),
        (
            ["--process.instant_share", "0", "--sample.sampler", "heun"],
            "sampler must be one of average for objective 'average' and instant_share 0, got 'heun'",
        ),
        (["--sample.guidance", "9"], "sample.guidance must be 1 to process.guidance_max 8, got 9"),
        (["--sample.guidance", "0.5"], "sample.guidance must be 1 to process.guidance_max 8, got 0.5"),
        (["--sample.reuse", "1:2"], "sample.reuse must be 'none' with sample.sampler 'average', got '1:2'"),
        (
            ["--sample.guidance_interval", "0.6", "0.9"],
            "sample.guidance_interval must be around 0.5 for a network that takes guidance, got 0.6 to 0.9",
        ),
        (["--sample.spacing", "log_snr"], "average needs spacing 'uniform', got 'log_snr'"),
        (
            ["--train.accumulation_steps", "8"],
            "process.instant_share 0.5 must leave an interval among the images of a part, got 1 images",
        ),
        (
            ["--process.instant_share", "0.01"],
            "process.instant_share 0.01 must leave an instant among the images of a part, got 8 images",
        ),
        (["--train.label_dropout", "0"], "model.takes_guidance needs train.label_dropout above 0, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(words, message, config, monkeypatch, capsys):
    assert message in refused("train", [config, *words], monkeypatch, capsys)
    assert not Path("runs").exists()


def test_solvers_of_another_kind_are_refused_in_sampling(config):
    train.main(["instant.py"])
    with pytest.raises(InputError, match=r"sampler must be one of ddim, .* for objective 'instant', got 'average'"):
        sample.main("--checkpoint runs/instant --sampler average --output x.png".split())
    train.main([config, "--process.instant_share", "0"])
    with pytest.raises(InputError, match=r"sampler must be one of average for .*, got 'heun'"):
        sample.main("--checkpoint runs/small --sampler heun --output x.png".split())


def test_a_network_without_these_inputs_refuses_them():
    network, x = UViT(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2), torch.zeros(2, 1, 8, 8)
    with pytest.raises(InputError, match=r"a model with takes_interval False takes no interval, got one"):
        network(x, 1.0, interval=1.0)
    with pytest.raises(InputError, match=r"a model with takes_guidance False takes no guidance, got one"):
        network(x, 1.0, guidance=torch.ones(2, 3))
    network = UViT(network.config, takes_interval=True, takes_guidance=True)
    assert network(x, 1.0, interval=np.float32(0.5)).shape == x.shape  # numbers are times, as those of `timesteps`
    for given, message in (
        ({"interval": torch.ones(3)}, r"interval must be \(2,\), got \(3,\)"),
        ({"interval": "long"}, r"interval must be a tensor of real numbers, or one of them, got str"),
        ({"guidance": 2.0}, r"guidance must be a floating point tensor, got float"),
        ({"guidance": torch.ones(2)}, r"guidance must be \(2, 3\), got \(2,\)"),
    ):
        with pytest.raises(InputError, match=message):
            network(x, 1.0, **given)


def test_without_a_guidance_it_is_one_of_scale_1():
    network = UViT(
        img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, takes_interval=True, takes_guidance=True
    ).eval()
    x, none = torch.randn(2, 1, 8, 8), torch.tensor([[1.0, 0.0, 1.0]]).expand(2, -1)
    expected = network(x, 2.0, interval=0.0, guidance=none)
    assert torch.equal(network(x, 2.0), expected)
    assert not torch.equal(network(x, 2.0, interval=1.0), expected)
    assert not torch.equal(network(x, 2.0, guidance=2 * none), expected)
