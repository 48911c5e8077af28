from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.same_runs import assert_equal_weights

from uvit import Config, UViT, UViTConfig
from uvit.common.errors import InputError
from uvit.config import ProcessConfig, SampleConfig, to_json
from uvit.networks.encoders import NO_ENCODERS
from uvit.sampling.runs import DrawArguments, load_run

CPU = torch.device("cpu")
MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3, null_class=True)
CONFIG = Config(model=MODEL, sample=SampleConfig(num_steps=7, guidance=1.5, sampler="ddim", reuse="1:2"))


@pytest.fixture
def run_dir(tmp_path):
    UViT(MODEL).save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(to_json(CONFIG))
    return tmp_path / "run"


def test_a_run_is_loaded_ready_to_draw(run_dir):
    config, network = load_run(str(run_dir), "auto", CPU)
    assert config == CONFIG and not network.training
    assert_equal_weights(network, UViT.from_pretrained(run_dir))


def test_a_broken_config_of_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"process": {"shedule": "flow"}}')
    with pytest.raises(InputError, match=r"config.json: ProcessConfig has no field 'shedule'"):
        load_run(str(tmp_path), "auto", CPU)


def test_weights_without_a_run_need_its_config(run_dir, tmp_path):
    network = UViT(MODEL)
    network.save_pretrained(tmp_path / "weights")
    torch.save(network.state_dict(), tmp_path / "nnet_ema.pth")
    config_file = str(run_dir / "config.json")
    for name in ("weights", "nnet_ema.pth"):
        with pytest.raises(InputError, match="holds only weights, expected a run: give the run's config with --config"):
            load_run(str(tmp_path / name), "auto", CPU)
        config, loaded = load_run(str(tmp_path / name), "auto", CPU, config_file)
        assert config == CONFIG
        assert_equal_weights(loaded, network)


def test_a_config_of_another_model_is_refused(run_dir, tmp_path):
    UViT(MODEL, num_heads=4).save_pretrained(tmp_path / "weights")
    with pytest.raises(InputError, match=r"weights is not the model of .*config.json: num_heads 4 and 2$"):
        load_run(str(tmp_path / "weights"), "auto", CPU, str(run_dir / "config.json"))


def test_settings_default_to_those_of_the_run(run_dir):
    config, _, encoders = DrawArguments(checkpoint=str(run_dir)).load()
    assert config == CONFIG and encoders == NO_ENCODERS
    config, *_ = DrawArguments(checkpoint=str(run_dir)).load(default_guidance=1.0)
    assert config.sample == dataclasses.replace(CONFIG.sample, guidance=1.0)


def test_given_settings_replace_those_of_the_run(run_dir):
    given = DrawArguments(
        checkpoint=str(run_dir),
        paper_scale=0.5,
        guidance_interval=(0.1, 0.9),
        steps=3,
        sampler="heun",
        spacing="log_snr",
        t_end=0.01,
        reuse="none",
        mixed_precision="bf16",
        attention="math",
    )
    config, network, _ = given.load(default_guidance=1.0)
    assert config.sample == SampleConfig(
        guidance=1.5,
        guidance_interval=(0.1, 0.9),
        num_steps=3,
        sampler="heun",
        spacing="log_snr",
        t_end=0.01,
        mixed_precision="bf16",
    )
    assert network.config.attention == "math"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "num_steps must be at least 1, got 0"),
        ({"mixed_precision": "fp16"}, "'fp16' needs a CUDA device, got 'cpu'"),
        ({"compile": "graphs"}, "compile 'graphs' needs a CUDA device, got 'cpu'"),
        ({"attention": "xformers"}, "attention 'xformers' needs a CUDA device, got 'cpu'"),
        ({"sampler": "euler_maruyama", "spacing": "uniform"}, "needs spacing 'log_snr', got 'uniform'"),
        ({"reuse": "2:2"}, "K of at most 1 pairs of blocks, got 2:2"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are fine with CUDA")
def test_settings_that_do_not_fit_are_refused_before_drawing(run_dir, fields, message):
    with pytest.raises(InputError, match=message):
        DrawArguments(checkpoint=str(run_dir), **fields).load()


def test_contradictory_settings_are_refused():
    with pytest.raises(InputError, match=r"give --guidance or --paper_scale, got both: 1.5 and 0.5"):
        DrawArguments(checkpoint="x", guidance=1.5, paper_scale=0.5)


def test_a_grid_too_fine_for_the_process_is_refused(run_dir):
    discrete = dataclasses.replace(CONFIG, process=ProcessConfig(schedule="ldm", prediction="noise"))
    (run_dir / "config.json").write_text(to_json(discrete))
    with pytest.raises(InputError, match=r"schedule 'ldm' begins at time 0.001, got a grid with 0.0005"):
        DrawArguments(checkpoint=str(run_dir), steps=2000).load()
