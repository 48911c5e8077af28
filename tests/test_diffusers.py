"""The pipeline of diffusers against sample.py, and our processes as its schedulers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from helpers.encoders import make_autoencoder, make_text_encoder
from helpers.golden import with_golden_weights
from helpers.hub_server import READER, Hub, serve_hub

from uvit import UNet, UViT, build_network
from uvit.commands import sample as sample_script
from uvit.common.errors import InputError
from uvit.common.files import write_text
from uvit.config import Config, DataConfig, ProcessConfig, SampleConfig, UNetConfig, UViTConfig, to_json
from uvit.diffusion.process import SCHEDULES
from uvit.diffusion.samplers import ImageNoise, denoiser, guide, sample
from uvit.diffusion.solvers import SOLVERS
from uvit.integrations.diffusers import UNetModel, UViTModel, UViTPipeline
from uvit.integrations.scheduler_steps import set_times
from uvit.integrations.schedulers import make_scheduler
from uvit.networks import backbone
from uvit.networks.encoders import load_encoders
from uvit.sampling.runs import load_run

NULL = 3
SHARED = {"img_size": 8, "in_chans": 1, "num_classes": NULL, "null_class": True}
UVIT = UViTConfig(patch_size=2, embed_dim=32, depth=2, num_heads=4, **SHARED)
SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_sizes": (), "head_dim": 32}
UNET = UNetConfig(out_chans=2, **SMALL, **SHARED)
LABELS = [0, 1, 2, 1]
FLOW = ProcessConfig(schedule="flow", prediction="flow")
LDM = ProcessConfig(schedule="ldm", prediction="v")
TABLES = [
    (schedule, prediction)
    for schedule in ("vp", "ldm", "ddpm", "iddpm", "cosine")
    for prediction in ("noise", "data", "v")
]


def random_weights(model: UViT | UNet) -> UViT | UNet:
    """Gives a network outputs of about unit variance."""
    if isinstance(model, UNet):
        return with_golden_weights(model).eval()
    torch.manual_seed(0)
    torch.nn.init.normal_(model.decoder_pred.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def network() -> UViT:
    torch.manual_seed(0)
    return random_weights(UViT(UVIT))


def pipeline(network: UViT, process: ProcessConfig, scheduler, **parts) -> UViTPipeline:
    pipe = UViTPipeline(network, scheduler, schedule=process.schedule, prediction=process.prediction, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def offload(pipe: UViTPipeline) -> None:
    """Does what enable_sequential_cpu_offload does, but with the CPU for the device, which that refuses."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def noise_for(network: UViT, count: int = len(LABELS)) -> torch.Tensor:
    shape = (network.config.in_chans, *network.config.image_shape)
    return ImageNoise([(7, number) for number in range(count)], shape, torch.device("cpu"))()


def theirs(network, process, scheduler, num_steps, guidance=1.5):
    return pipeline(network, process, scheduler)(
        class_labels=LABELS,
        guidance_scale=guidance,
        num_inference_steps=num_steps,
        latents=noise_for(network),
        output_type="latent",
    ).images


def ours(network, process, sampler, num_steps, guidance=1.5):
    y = torch.tensor(LABELS)
    config = SampleConfig(sampler=sampler, num_steps=num_steps, guidance=guidance)
    null = {"y": torch.full_like(y, NULL)}
    return sample(network, process, config, lambda: noise_for(network), {"y": y}, null)


@torch.no_grad()
def ours_at(network, process, sampler, times, guidance=1.5):
    y, schedule = torch.tensor(LABELS), SCHEDULES[process.schedule]
    output = guide(network, schedule, {"y": y}, {"y": torch.full_like(y, NULL)}, guidance)
    return SOLVERS[sampler](denoiser(output, schedule, process.prediction), noise_for(network), schedule, times)


def assert_equal_to_rounding(given, expected, tolerance=1e-4):
    """Noise divided by a vanishing α leaves images of a random network in the thousands: rounding scales with them."""
    assert expected.isfinite().all() and expected.std() > 0.1
    assert (given - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize(("schedule", "prediction"), TABLES)
def test_pipelines_of_tables_draw_the_images_of_sample_py(network, schedule, prediction, sampler):
    process = ProcessConfig(schedule=schedule, prediction=prediction)
    # The table of a network that cannot predict from α = 0 has 999 entries.
    num_steps = 9 if SCHEDULES[schedule].singular_start and prediction == "noise" else 10
    given = theirs(network, process, make_scheduler(process, sampler), num_steps)
    if schedule == "cosine" and prediction != "noise" and sampler != "ddim":
        # Multistep schedulers of diffusers begin at α = 2⁻¹² for 0: there our solvers give the same.
        first = 1 - 2 / torch.pi * np.arcsin(2**-12)
        times = [first, *np.linspace(1, 0, num_steps + 1)[1:]]
        assert_equal_to_rounding(given, ours_at(network, process, sampler, times), 2e-3)
        assert (given - ours(network, process, sampler, num_steps)).abs().mean() < 0.02 * given.std()
    else:
        assert_equal_to_rounding(given, ours(network, process, sampler, num_steps))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("prediction", ["flow", "data", "noise"])
def test_pipelines_of_flow_draw_the_images_of_sample_py(network, prediction, sampler, shift):
    process = ProcessConfig(schedule="flow", prediction=prediction, time_shift=shift)
    if prediction != "flow" and sampler in ("euler", "heun"):
        with pytest.raises(InputError, match="schedule 'flow' are dpmpp_2m, unipc, got sampler"):
            make_scheduler(process, sampler)
        return
    scheduler = make_scheduler(process, sampler)
    given = theirs(network, process, scheduler, 10)
    if sampler == "unipc" and prediction != "noise":
        # Its scheduler begins at 1 - 1e-6 and so corrects a first step that is infinite in ours.
        times = [*set_times(scheduler, process, 10), 0.0]
        assert times[0] == pytest.approx(1 - 1e-6, abs=1e-7)
        assert_equal_to_rounding(given, ours_at(network, process, sampler, times))
    else:
        assert_equal_to_rounding(given, ours(network, process, sampler, 10))


def test_guidance_scale_is_w(network):
    process = ProcessConfig(schedule="ldm", prediction="v")
    images = {w: theirs(network, process, make_scheduler(process, "ddim"), 5, guidance=w) for w in (0.0, 1.0, 4.0)}
    for w, given in images.items():
        assert_equal_to_rounding(given, ours(network, process, "ddim", 5, guidance=w))
    assert not torch.allclose(images[0.0], images[1.0], atol=0.01)
    assert not torch.allclose(images[4.0], images[1.0], atol=0.01)


@pytest.mark.parametrize(
    "cls", [EulerDiscreteScheduler, DEISMultistepScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler]
)
@pytest.mark.parametrize("schedule", ["vp", "ldm", "ddpm"])
def test_other_schedulers_take_the_config(network, cls, schedule):
    process = ProcessConfig(schedule=schedule, prediction="v")
    scheduler = cls.from_config(make_scheduler(process).config)
    pipe = pipeline(network, process, scheduler)
    draw = {"class_labels": LABELS, "num_inference_steps": 10, "output_type": "latent"}
    first, second = (pipe(**draw, generator=torch.manual_seed(0)).images for _ in range(2))
    assert torch.equal(first, second) and 0.1 < first.std() < 5
    if cls is EulerDiscreteScheduler:  # which is DDIM in other coordinates, and takes the first noise for σ / α
        sigma = scheduler.sigmas[0]
        latents = noise_for(network) * (sigma**2 + 1).sqrt() / sigma
        expected = ours(network, process, "ddim", 10, guidance=1.0)
        assert_equal_to_rounding(pipe(**draw, latents=latents).images, expected, 2e-3)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
def test_schedulers_made_from_another_config_do_not_clip(network, sampler, tmp_path):
    """DDIM and DDPM do, unless their config says otherwise."""
    process = ProcessConfig(schedule="ldm", prediction="v")
    expected = ours(network, process, "ddim", 10)
    assert expected.abs().max() > 1.5
    made = make_scheduler(process, sampler)
    made.save_pretrained(tmp_path)
    for scheduler in (DDIMScheduler.from_config(made.config), DDIMScheduler.from_pretrained(tmp_path)):
        assert_equal_to_rounding(theirs(network, process, scheduler, 10), expected)
    assert not DDPMScheduler.from_config(made.config).config.clip_sample


def test_latents_are_not_clipped(network):
    process = ProcessConfig(schedule="ldm", prediction="v")
    config = make_scheduler(process).config
    clipping = DDIMScheduler.from_config(config, clip_sample=True)
    pipeline(network, process, clipping)  # of pixels, whose bounds are known
    latents = UViT(img_size=4, in_chans=4, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(InputError, match="DDIMScheduler must have clip_sample False for this pipeline, got True"):
        pipeline(latents, process, clipping)
    with pytest.raises(InputError, match="must have thresholding False"):
        pipeline(latents, process, DPMSolverMultistepScheduler.from_config(config, thresholding=True))
    # The class of this one has no such option, though its config keeps it.
    pipeline(latents, process, EulerDiscreteScheduler.from_config(clipping.config))


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
def test_more_steps_than_entries_of_a_table_are_refused(network, sampler):
    process = ProcessConfig(schedule="cosine", prediction="noise")
    with pytest.raises(InputError, match="num_inference_steps must be at most 999, the entries of a table, got 1000"):
        theirs(network, process, make_scheduler(process, sampler), 1000)


@pytest.mark.parametrize(
    ("process", "scheduler", "message"),
    [
        (
            FLOW,
            DDIMScheduler(),
            "DDIMScheduler follows another table of alphas, expected the process of schedule 'flow'",
        ),
        (
            FLOW,
            DPMSolverMultistepScheduler(use_flow_sigmas=True),
            "prediction_type 'epsilon', expected 'flow_prediction'",
        ),
        (FLOW, EDMEulerScheduler(), "EDMEulerScheduler follows an unknown process"),
        (FLOW, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "must have use_dynamic_shifting False"),
        (FLOW, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "must have invert_sigmas False"),
        (  # which follows a table of alphas then
            FLOW,
            UniPCMultistepScheduler.from_config(make_scheduler(FLOW).config, use_karras_sigmas=True),
            "UniPCMultistepScheduler must have use_karras_sigmas False",
        ),
        (
            ProcessConfig(schedule="flow", prediction="noise"),
            FlowMatchEulerDiscreteScheduler(),
            "takes prediction_type 'flow_prediction', expected 'epsilon' for a network that predicts 'noise'",
        ),
        (  # which keeps the other class's prediction_type, and does not follow it
            ProcessConfig(schedule="flow", prediction="noise"),
            FlowMatchEulerDiscreteScheduler.from_config(
                make_scheduler(ProcessConfig(schedule="flow", prediction="noise")).config
            ),
            "takes prediction_type 'flow_prediction', expected 'epsilon' for a network that predicts 'noise'",
        ),
        (  # which keeps use_flow_sigmas likewise
            FLOW,
            EulerDiscreteScheduler.from_config(make_scheduler(FLOW).config),
            "EulerDiscreteScheduler follows another table of alphas, expected the process of schedule 'flow'",
        ),
        (
            ProcessConfig(schedule="vp", prediction="noise"),
            FlowMatchHeunDiscreteScheduler(),
            "FlowMatchHeunDiscreteScheduler follows flow, expected the process of schedule 'vp'",
        ),
        (ProcessConfig(schedule="ldm", prediction="noise"), DDPMScheduler(), "another table of alphas"),
        (
            ProcessConfig(schedule="ldm", prediction="v"),
            make_scheduler(ProcessConfig(schedule="ldm", prediction="noise")),
            "takes prediction_type 'epsilon', expected 'v_prediction' for a network that predicts 'v'",
        ),
        (
            ProcessConfig(schedule="vp", prediction="noise"),
            make_scheduler(ProcessConfig(schedule="cosine", prediction="noise")),
            "another table of alphas",
        ),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(network, process, scheduler, message):
    with pytest.raises(InputError, match=message) as error:
        pipeline(network, process, scheduler)
    assert "\n" not in str(error.value)


def test_a_scheduler_that_is_replaced_later_is_checked(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(InputError, match="DDIMScheduler follows"):
        pipe(class_labels=[0])


def save_run(folder, config: Config) -> UViT | UNet:
    model = random_weights(build_network(config.model))
    model.save_pretrained(folder)
    write_text(folder / "config.json", to_json(config))
    return model


@pytest.mark.parametrize("model", [UVIT, UNET], ids=["uvit", "unet"])
def test_a_run_draws_what_sample_py_writes(model, tmp_path, capsys):
    """The same noise, the run's default solver, to a level of 8 bits."""
    config = Config(
        model=model,
        process=ProcessConfig(time_shift=2.0),
        data=DataConfig(class_names=("cat", "1", "dog")),
        sample=SampleConfig(num_steps=6, guidance=1.5, guidance_interval=(0.2, 0.9), reuse="1:2"),
    )
    save_run(tmp_path / "run", config)
    output = tmp_path / "images.npz"
    arguments = ["--checkpoint", str(tmp_path / "run"), "--num_per_class", "2", "--seed", "5", "--output", str(output)]
    sample_script.main([*arguments, "--classes", "0", "2"])
    expected = np.load(output)["arr_0"].astype(int)

    pipe = UViTPipeline.from_run(str(tmp_path / "run"))
    pipe.save_pretrained(tmp_path / "pipe")
    noise = ImageNoise([(5, 0, 0), (5, 0, 1), (5, 2, 0), (5, 2, 1)], (1, 8, 8), torch.device("cpu"))()
    settings = {"guidance_scale": 1.5, "guidance_interval": [0.2, 0.9], "num_inference_steps": 6, "reuse": "1:2"}
    for each in (pipe, UViTPipeline.from_pretrained(tmp_path / "pipe")):
        images = each(["cat", 0, "dog", 2], latents=noise, **settings).images
        assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 4
        given = np.stack([np.asarray(image, dtype=int)[..., None] for image in images])
        assert np.abs(given - expected).max() <= 1 and expected.std() > 10
    whole = pipe(["cat", "dog"], num_images_per_prompt=2, latents=noise, **{**settings, "reuse": "none"}).images
    assert np.abs(np.stack([np.asarray(image, dtype=int)[..., None] for image in whole]) - expected).max() > 1


def test_published_weights_become_a_pipeline_by_their_config(network, tmp_path):
    """The solvers of the published recipes are not among diffusers'."""
    network.save_pretrained(tmp_path / "weights")
    process = ProcessConfig(schedule="vp", prediction="noise")
    config = Config(model=network.config, process=process, sample=SampleConfig(sampler="dpm_solver_fast"))
    write_text(tmp_path / "recipe.json", to_json(config))
    weights, recipe = str(tmp_path / "weights"), str(tmp_path / "recipe.json")
    with pytest.raises(InputError, match="got sampler 'dpm_solver_fast': give one of these as sampler"):
        UViTPipeline.from_run(weights, config_file=recipe)
    pipe = UViTPipeline.from_run(weights, sampler="unipc", config_file=recipe)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.process == process
    assert torch.equal(pipe.transformer.norm.weight, network.norm.weight)


def test_a_saved_pipeline_holds_an_ordinary_folder_of_weights(network, tmp_path):
    process = ProcessConfig(schedule="cosine", prediction="v")
    pipe = pipeline(network, process, make_scheduler(process, "ddim"), class_names=["a", "b", "c"])
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["uvit.integrations.diffusers", "UViTModel"] and index["vae"] == [None, None]
    assert index["schedule"] == "cosine" and index["class_names"] == ["a", "b", "c"]
    draw = {"class_labels": ["c", 0], "num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "pt"}
    first, second = (
        each(**draw, generator=torch.manual_seed(3)).images for each in (pipe, UViTPipeline.from_pretrained(tmp_path))
    )
    assert torch.equal(first, second) and first.min() >= 0 and first.max() <= 1
    plain = UViT.from_pretrained(tmp_path / "transformer")
    assert plain.config == network.config
    assert all(torch.equal(plain.state_dict()[name], each) for name, each in network.state_dict().items())
    half = UViTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert (half(**draw, generator=torch.manual_seed(3)).images - first).abs().mean() < 0.1
    swapped = UViTPipeline.from_pretrained(tmp_path, scheduler=make_scheduler(process, "unipc"))
    assert isinstance(swapped.scheduler, UniPCMultistepScheduler)
    with pytest.raises(InputError, match="follows another table of alphas"):
        UViTPipeline.from_pretrained(tmp_path, scheduler=DDIMScheduler(prediction_type="v_prediction"))


def test_a_network_of_latents_is_decoded_by_its_autoencoder(tmp_path):
    make_autoencoder(tmp_path / "vae")
    model = UViTConfig(img_size=4, in_chans=4, embed_dim=16, depth=2, num_heads=2)
    config = Config(model=model, data=DataConfig(autoencoder=str(tmp_path / "vae"), scale_factor=0.5))
    save_run(tmp_path / "run", config)
    UViTPipeline.from_run(str(tmp_path / "run"), sampler="euler").save_pretrained(tmp_path / "pipe")
    pipe = UViTPipeline.from_pretrained(tmp_path / "pipe")
    latents = noise_for(pipe.transformer, 3)
    images = pipe(batch_size=3, num_inference_steps=5, latents=latents, output_type="pt").images
    encoders = load_encoders(config.data, model)
    euler = SampleConfig(sampler="euler", num_steps=5)
    expected = encoders.image.decode(sample(pipe.transformer, FLOW, euler, lambda: latents, {}))
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert images.shape == (3, 3, 8, 8) and images.std() > 0.01
    offload(pipe)
    again = pipe(batch_size=3, num_inference_steps=5, latents=latents, output_type="pt").images
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)
    pipe.remove_all_hooks()
    pipe.vae = None
    with pytest.raises(InputError, match="in_chans 4 needs a vae to make images"):
        pipe()
    assert pipe(output_type="latent", num_inference_steps=2).images.shape == (1, 4, 4, 4)


def test_prompts_of_a_text_model(tmp_path):
    make_text_encoder(tmp_path / "clip", num_tokens=12, width=8)
    model = UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, context_dim=8, num_context_tokens=12)
    settings = SampleConfig(num_steps=5, guidance=3.0)
    config = Config(model=model, data=DataConfig(text_encoder=str(tmp_path / "clip")), sample=settings)
    save_run(tmp_path / "run", config)
    UViTPipeline.from_run(str(tmp_path / "run")).save_pretrained(tmp_path / "pipe")
    pipe = UViTPipeline.from_pretrained(tmp_path / "pipe")
    draw = {
        "guidance_scale": 3.0,
        "num_inference_steps": 5,
        "output_type": "latent",
        "latents": noise_for(pipe.transformer, 2),
    }
    images = pipe(prompt=["a cat", "two dogs"], **draw).images

    _, network = load_run(str(tmp_path / "run"), "auto", torch.device("cpu"))
    text = load_encoders(config.data, model).text
    cond, uncond = {"context": text(["a cat", "two dogs"])}, {"context": text([""]).expand(2, -1, -1)}
    expected = sample(network, FLOW, settings, lambda: draw["latents"], cond, uncond)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(images, pipe(prompt=["a cat", "a cat"], **draw).images, atol=1e-4)

    leading_away = {"context": text(["two dogs"] * 2)}
    expected = sample(network, FLOW, settings, lambda: draw["latents"], cond, leading_away)
    given = pipe(prompt=["a cat", "two dogs"], negative_prompt="two dogs", **draw).images
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
    first, second = pipe(prompt="a cat", num_images_per_prompt=2, **draw), pipe(prompt=["a cat"] * 2, **draw)
    assert torch.equal(first.images, second.images)
    offload(pipe)
    again = pipe(prompt=["a cat", "two dogs"], **draw).images
    torch.testing.assert_close(again, images, rtol=0, atol=1e-5)

    with pytest.raises(InputError, match="draws from prompts, got none"):
        pipe()
    with pytest.raises(InputError, match=r"prompts must be tuple\[str, ...\], got \(5,\)"):
        pipe(prompt=5)
    with pytest.raises(InputError, match=r"negative_prompt must be one text, .* got \['a', 'b'\]"):
        pipe(prompt=["a cat"], negative_prompt=["a", "b"])
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    with pytest.raises(InputError, match="needs a text encoder and a tokenizer, got none"):
        pipeline(network, FLOW, make_scheduler(FLOW), **{**parts, "tokenizer": None})
    other = UViT(dataclasses.replace(model, num_context_tokens=5))
    with pytest.raises(InputError, match=r"gives 12 tokens of width 8, expected model.num_context_tokens 5 and"):
        pipeline(other, FLOW, make_scheduler(FLOW), **parts)


def test_one_generator_for_each_image(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    both = pipe([1, 2], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)], output_type="np").images
    alone = pipe(2, generator=torch.Generator().manual_seed(6), output_type="np", return_dict=False)[0]
    assert both.shape == (2, 8, 8, 1)
    np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    for count in (0, 1, 3):
        with pytest.raises(InputError, match=f"generator must be one, or one for each of 2 images, got {count}"):
            pipe([1, 2], generator=[torch.Generator() for _ in range(count)])


@pytest.mark.parametrize("labels", [torch.tensor([0, 2]), np.array([0, 2]), (0, "2"), [np.int64(0), 2]])
def test_labels_may_be_tensors(network, labels):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    draw = {"latents": noise_for(network, 2), "num_inference_steps": 3, "output_type": "latent"}
    assert torch.equal(pipe(labels, **draw).images, pipe([0, 2], **draw).images)
    draw["latents"] = noise_for(network, 1)
    assert torch.equal(pipe(torch.tensor(0), **draw).images, pipe(0, **draw).images)


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (UVIT, "out_blocks.0.skip_linear"),
        (dataclasses.replace(UVIT, pos_embed="sincos2d", time_conditioning="adaln", qk_norm=True), "mid_block.mlp.fc1"),
        (UNET, "output_blocks.0.0.skip_connection"),
    ],
    ids=["uvit", "options", "unet"],
)
def test_weights_may_be_offloaded_between_layers(config, layer):
    """As if memory were short: here the CPU stands for the device, and offloaded weights are on `meta`."""
    model = random_weights(build_network(config))
    pipe = pipeline(model, FLOW, make_scheduler(FLOW))
    draw = {"class_labels": [0, 1], "latents": noise_for(model, 2), "output_type": "latent", "reuse": "1:2"}
    images = pipe(**draw).images
    offload(pipe)
    assert pipe.transformer.get_submodule(layer).weight.is_meta
    torch.testing.assert_close(pipe(**draw).images, images, rtol=0, atol=1e-5)
    pipe.remove_all_hooks()

    other = pipeline(model, FLOW, make_scheduler(FLOW))
    other.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert other.transformer.get_submodule(layer).weight.dtype == torch.bfloat16
    assert (other(**draw).images - images).abs().mean() < 0.1 * images.std()


def test_a_callback_may_watch_and_change_latents(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    seen = []

    def watch(given, step, timestep, tensors):
        assert given is pipe
        seen.append((step, float(timestep), tensors["latents"].clone()))
        return {}

    draw = {"class_labels": [0], "latents": noise_for(network, 1), "num_inference_steps": 4, "output_type": "latent"}
    images = pipe(**draw, callback_on_step_end=watch).images
    assert [each[:2] for each in seen] == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert torch.equal(seen[-1][2], images)
    zeros = pipe(**draw, callback_on_step_end=lambda *given: {"latents": torch.zeros_like(given[-1]["latents"])}).images
    assert torch.equal(zeros, torch.zeros_like(images))


def test_a_callback_may_end_sampling(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    draw = {"class_labels": [0], "latents": noise_for(network, 1), "num_inference_steps": 4, "output_type": "latent"}
    seen = []

    def stop(given, step, timestep, tensors):
        assert given.num_timesteps == 4 and not given.interrupt
        seen.append(tensors["latents"].clone())
        given._interrupt = step == 1

    images = pipe(**draw, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latents"]).images
    assert len(seen) == 2 and torch.equal(images, seen[1])
    assert not torch.equal(pipe(**draw).images, images), "the next call runs to its end"
    nothing = []
    pipe(**draw, callback_on_step_end=lambda *given: nothing.append(given[-1]), callback_on_step_end_tensor_inputs=[])
    assert nothing == [{}] * 4

    class Official(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

    for options in ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, {"callback_on_step_end": Official()}):
        with pytest.raises(InputError, match="tensor_inputs must be of latents, got 'prompt_embeds'"):
            pipe(**draw, **options)


@pytest.mark.parametrize("config", [UVIT, UNET])
def test_a_pipeline_may_be_made_from_another(config):
    first = pipeline(random_weights(build_network(config)), FLOW, make_scheduler(FLOW), class_names=["a", "b", "c"])
    second = UViTPipeline.from_pipe(first)
    assert second.transformer is first.transformer and second.config["class_names"] == ["a", "b", "c"]
    draw = {"class_labels": ["b"], "num_inference_steps": 2, "output_type": "latent"}
    given, expected = (pipe(**draw, generator=torch.manual_seed(0)).images for pipe in (second, first))
    assert torch.equal(given, expected)
    other = UViTPipeline.from_pipe(first, scheduler=make_scheduler(FLOW, "heun"))
    assert isinstance(other.scheduler, FlowMatchHeunDiscreteScheduler)
    assert UViTPipeline.from_pipe(first, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    with pytest.raises(InputError, match="torch_dtype must be a floating point dtype"):
        UViTPipeline.from_pipe(first, torch_dtype=torch.int8)


@pytest.mark.parametrize("config", [UVIT, UNET])
def test_a_part_counts_parameters_and_recomputes_blocks_as_a_model_of_diffusers(config, monkeypatch):
    plain = random_weights(build_network(config))
    part = pipeline(plain, FLOW, make_scheduler(FLOW)).transformer
    assert part.num_parameters() == plain.num_parameters
    next(part.parameters()).requires_grad_(False)
    assert part.num_parameters(only_trainable=True) < part.num_parameters()
    embedding = sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, torch.nn.Embedding))
    assert part.num_parameters(exclude_embeddings=True) == part.num_parameters() - embedding < part.num_parameters()

    calls = []
    recompute = backbone.checkpoint
    monkeypatch.setattr(backbone, "checkpoint", lambda *given, **named: calls.append(1) or recompute(*given, **named))
    inputs = noise_for(plain), 500.0, torch.tensor(LABELS)
    assert not part.is_gradient_checkpointing
    expected = part(*inputs)
    assert not calls
    part.enable_gradient_checkpointing()
    assert part.is_gradient_checkpointing and torch.equal(part(*inputs), expected)
    assert len(calls) == len(part.blocks)
    with pytest.raises(InputError, match="gradient_checkpointing_func must be None, for PyTorch's own, got <"):
        part.enable_gradient_checkpointing(recompute)
    part.disable_gradient_checkpointing()
    part(*inputs)
    assert not part.is_gradient_checkpointing and len(calls) == len(part.blocks)


def test_numbers_of_numpy_are_numbers(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW))
    latents = noise_for(network, 2)
    draw = {"class_labels": [1], "latents": latents, "output_type": "latent"}
    given, expected = (
        pipe(**draw, num_inference_steps=whole(3), num_images_per_prompt=whole(2), guidance_scale=real(1.5)).images
        for whole, real in ((np.int64, np.float32), (int, float))
    )
    assert torch.equal(given, expected)
    table = pipeline(network, LDM, make_scheduler(LDM))  # of more entries than the type of the number has values
    assert table(**draw, num_inference_steps=np.uint8(3), num_images_per_prompt=2).images.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_a_pipeline_draws_in_inference_mode(network, sampler):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW, sampler))
    draw = {"class_labels": [1], "latents": noise_for(network, 1), "num_inference_steps": 3, "output_type": "latent"}
    expected = pipe(**draw).images
    with torch.inference_mode():
        assert torch.equal(pipe(**draw).images, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_classes 3 takes class_labels, got none"),
        ({"class_labels": [3]}, "class must be 0 to 2 or a class name, got '3'"),
        ({"class_labels": [-1]}, "class must be 0 to 2"),
        ({"class_labels": "dgo"}, "got 'dgo', did you mean 'dog'"),
        ({"class_labels": [0], "prompt": "a cat"}, "context_dim 0 takes no prompt, got "),
        (
            {"class_labels": [0], "latents": torch.zeros(1, 1, 4, 4)},
            r"latents must be \(1, 1, 8, 8\), got \(1, 1, 4, 4\)",
        ),
        ({"class_labels": torch.zeros(1, 2)}, r"class must be 0 to 2 or a class name, got '\[0.0, 0.0\]'"),
        ({"class_labels": 0.5}, "class must be 0 to 2 or a class name, got '0.5'"),
        ({"class_labels": torch.tensor([])}, "num_classes 3 takes class_labels, got none"),
        ({"class_labels": [0], "num_inference_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"class_labels": [0], "num_inference_steps": 2.5}, "num_steps must be int, got 2.5"),
        ({"class_labels": [0], "guidance_scale": "high"}, "guidance must be float, got 'high'"),
        ({"class_labels": [0], "guidance_interval": (0.5,)}, r"guidance_interval must be .*, got \(0.5,\)"),
        ({"class_labels": [0], "guidance_interval": 0.5}, "guidance_interval must be .*, got 0.5"),
        ({"class_labels": [0], "reuse": "2:2"}, "reuse must have K of at most 1 pairs of blocks, got 2:2"),
        ({"class_labels": [0], "batch_size": 4}, "batch_size must be None for a model that takes class_labels"),
        (
            {"class_labels": [0], "num_images_per_prompt": 0},
            "num_images_per_prompt must be a whole number from 1, got 0",
        ),
        ({"class_labels": [0], "output_type": "png"}, "output_type must be one of pil, np, pt, latent, got 'png'"),
        ({"class_labels": [0, 1], "generator": (torch.Generator(),)}, "one for each of 2 images, got 1"),
        ({"class_labels": [0], "generator": 3}, "generator must be a torch.Generator, got 3"),
        ({"class_labels": [0], "latents": np.zeros((1, 1, 8, 8))}, "latents must be a tensor, got ndarray"),
        (
            {"class_labels": [0], "callback_on_step_end": lambda *given: given[-1]["latents"]},
            "callback_on_step_end must return a dict or None, got Tensor",
        ),
        (
            {"class_labels": [0], "callback_on_step_end": lambda *given: {"latents": None}},
            "latents must be a tensor, got NoneType",
        ),
        ({"class_labels": [0], "negative_prompt": "a dog"}, "for a model that takes prompts, got 'a dog'"),
    ],
)
def test_invalid_arguments_of_a_call_are_refused(network, arguments, message):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW), class_names=["cat", "2", "dog"])
    with pytest.raises(InputError, match=message):
        pipe(**arguments)


def test_a_class_name_may_be_the_number_of_another_label(network):
    pipe = pipeline(network, FLOW, make_scheduler(FLOW), class_names=["cat", "2", "dog"])
    latents = noise_for(network, 1)
    by_name, first, second = (
        pipe(each, latents=latents, num_inference_steps=3, output_type="latent").images for each in ("2", 1, 2)
    )
    assert torch.equal(by_name, first) and not torch.allclose(first, second, atol=1e-3)


def test_guidance_needs_a_null_class(network):
    plain = UViT(dataclasses.replace(network.config, null_class=False)).eval()
    with pytest.raises(InputError, match=r"guidance 2.0 needs model.null_class, got False"):
        pipeline(plain, FLOW, make_scheduler(FLOW))(0, guidance_scale=2.0)


def test_parts_that_do_not_fit(network, tmp_path):
    vae = make_autoencoder(tmp_path / "vae")
    with pytest.raises(InputError, match=r"latents of 4 channels, expected model.in_chans 1"):
        pipeline(network, FLOW, make_scheduler(FLOW), vae=vae)
    with pytest.raises(InputError, match="schedule must be one of"):
        UViTPipeline(network, make_scheduler(FLOW), schedule="linear")
    with pytest.raises(InputError, match=r"must have model.num_classes 3 names, got 1"):
        pipeline(network, FLOW, make_scheduler(FLOW), class_names=["cat"])
    with pytest.raises(InputError, match=r"is not a pipeline, it has no model_index.json"):
        UViTPipeline.from_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="pipeline not found"):
        UViTPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(InputError, match="the transformer must be a UViT or a UNet, got AutoencoderKL"):
        pipeline(vae, FLOW, make_scheduler(FLOW))
    plain = UViT(img_size=8, embed_dim=16, depth=2, num_heads=2)
    for batch_size in (0, 1.5):
        with pytest.raises(InputError, match=f"batch_size must be a whole number from 1, got {batch_size}"):
            pipeline(plain, FLOW, make_scheduler(FLOW))(batch_size=batch_size)


def test_arguments_of_diffusers_are_followed_or_refused(network, tmp_path):
    pipeline(network, FLOW, make_scheduler(FLOW)).save_pretrained(tmp_path)
    model = UViTModel.from_pretrained(
        tmp_path,
        subfolder="transformer",
        device_map="cpu",
        dtype=torch.bfloat16,
        attention="math",
        use_safetensors=True,
    )
    assert model.dtype == torch.bfloat16 and model.config.attention == "math"
    folder = tmp_path / "transformer"
    for argument, message in {
        "atention": "UViTConfig has no field 'atention', did you mean 'attention'",
        "variant": "UViTConfig has no field 'variant'",
        "revision": "revision must be None for what is on disk, got 'auto'",
        "device_map": "device_map must be one device for a network, such as 'cuda', got 'auto'",
        "torch_dtype": "torch_dtype must be a floating point dtype such as torch.float16, got 'auto'",
    }.items():
        with pytest.raises(InputError, match=message):
            UViTModel.from_pretrained(folder, **{argument: "auto"})
    for argument in ("variant", "force_download", "custom_pipeline"):
        with pytest.raises(InputError, match=f"from_pretrained takes no argument '{argument}'"):
            UViTPipeline.from_pretrained(tmp_path, **{argument: "auto"})
    with pytest.raises(InputError, match=r"torch_dtype must be a floating point dtype .* got torch.int8"):
        UViTPipeline.from_pretrained(tmp_path, torch_dtype={"transformer": torch.int8})
    with pytest.raises(InputError, match="takes no argument 'schedular', did you mean 'schedule"):
        UViTPipeline.from_pretrained(tmp_path, schedular=make_scheduler(FLOW))
    pipe = UViTPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, device_map="cpu", low_cpu_mem_usage=True)
    assert pipe.transformer.dtype == torch.bfloat16


def publish(hub: Hub, name: str, folder: Path, revision: str = "main") -> None:
    hub.repositories.setdefault(name, {})
    hub.private.setdefault(name, False)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.commit(name, revision, files)


def test_a_pipeline_of_the_hub(network, tmp_path, monkeypatch):
    other = UViT(network.config).eval()
    for name, model in (("first", network), ("second", other)):
        pipeline(model, FLOW, make_scheduler(FLOW)).save_pretrained(tmp_path / name)
    own = {"token": READER, "cache_dir": tmp_path / "own"}
    with serve_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        publish(hub, "me/pipe", tmp_path / "second")
        publish(hub, "me/pipe", tmp_path / "first", "v1")
        hub.private["me/pipe"] = True
        with pytest.raises(InputError, match="there is no such repository, or it is private"):
            UViTPipeline.from_pretrained("me/pipe")
        loaded = [
            (other, UViTPipeline.from_pretrained("me/pipe", **own).transformer),
            (network, UViTPipeline.from_pretrained("me/pipe", revision="v1", **own).transformer),
            (network, UViTPipeline.from_pretrained("me/pipe@v1", **own).transformer),
            (network, UViTModel.from_pretrained("me/pipe", subfolder="transformer", revision="v1", **own)),
        ]
        with pytest.raises(InputError, match="it has no such revision"):
            UViTPipeline.from_pretrained("me/pipe", revision="v2", **own)
    assert not (tmp_path / "cache").exists()
    loaded.append((other, UViTPipeline.from_pretrained("me/pipe", **own, local_files_only=True).transformer))
    for model, given in loaded:
        assert torch.equal(given.mid_block.mlp.fc1.weight, model.mid_block.mlp.fc1.weight)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (None, "me/other is not a pipeline, it has no model_index.json"),
        (b"{", "model_index.json is not valid JSON"),
        (b"[1]", r"is a pipeline of another kind, expected transformer .*UViTModel.*, got \[1\]"),
        (b'{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}', "got None"),
        (b'{"transformer": ["diffusers", "UNet2DModel"]}', r"got \['diffusers', 'UNet2DModel'\]"),
    ],
)
def test_nothing_is_fetched_of_other_pipelines(tmp_path, monkeypatch, index, message):
    with serve_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        hub.repositories["me/other"], hub.private["me/other"] = {}, False
        files = {"config.json": b"{}", "unet/model.safetensors": b"gigabytes"}
        hub.commit("me/other", "main", files if index is None else {**files, "model_index.json": index})
        with pytest.raises(InputError, match=message) as error:
            UViTPipeline.from_pretrained("me/other")
    assert "\n" not in str(error.value)
    assert not [*(tmp_path / "cache").rglob("*.safetensors")] and not [*(tmp_path / "cache").rglob("config.json")]


def test_an_incomplete_pipeline_is_refused(network, tmp_path):
    pipeline(network, FLOW, make_scheduler(FLOW)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InputError, match=r"pipeline .* cannot be loaded: ") as error:
        UViTPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    del index["scheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"pipeline .* cannot be loaded: .* expected"):
        UViTPipeline.from_pretrained(tmp_path)


def test_a_pipeline_of_a_unet_holds_its_folder_of_weights(tmp_path):
    network = random_weights(UNet(UNET))
    pipeline(network, FLOW, make_scheduler(FLOW)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["uvit.integrations.diffusers", "UNetModel"]
    for loaded in (UNet.from_pretrained(tmp_path / "transformer"), UNetModel.from_pretrained(tmp_path / "transformer")):
        assert loaded.config == UNET
        assert all(torch.equal(loaded.state_dict()[name], each) for name, each in network.state_dict().items())
    with pytest.raises(InputError, match="has the weights of a U-Net, expected those of a U-ViT"):
        UViTModel.from_pretrained(tmp_path, subfolder="transformer")


def test_reuse_needs_long_skips():
    pipe = pipeline(UNet(dataclasses.replace(UNET, skips=False)).eval(), FLOW, make_scheduler(FLOW))
    with pytest.raises(InputError, match="reuse needs a model with long skips, got 1:2 and one without"):
        pipe([0], reuse="1:2")


def test_a_plain_network_is_copied_in_its_dtype(network):
    source = UViT(dataclasses.replace(network.config, pos_embed="sincos2d")).to(torch.bfloat16)
    model = UViTModel.of(source)
    assert model.dtype == torch.bfloat16 and not model.training
    assert torch.equal(model.pos_embed, source.pos_embed) and model.config == source.config
    assert all(torch.equal(model.state_dict()[name], each) for name, each in source.state_dict().items())
    assert model.norm.weight.data_ptr() != source.norm.weight.data_ptr()


@pytest.mark.parametrize("prediction", ["flow", "data"])
@pytest.mark.parametrize("takes_guidance", [False, True])
def test_an_average_velocity_is_drawn_over_the_steps_of_euler(prediction, takes_guidance, tmp_path):
    """As sample.py does; by other schedulers with that of an instant."""
    torch.manual_seed(0)
    sizes = dict(img_size=8, in_chans=1, embed_dim=32, depth=2, num_heads=2, num_classes=3, null_class=True)
    network = UViT(**sizes, takes_interval=True, takes_guidance=takes_guidance).eval()
    process = ProcessConfig(objective="average", prediction=prediction, time_scale=2.0)
    shared = {"prediction": prediction, "time_scale": 2.0}
    UViTPipeline(network, make_scheduler(ProcessConfig(), "euler"), **shared).save_pretrained(tmp_path)
    pipe = UViTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    cond, uncond = {"y": y}, {"y": torch.full_like(y, 3)}
    if takes_guidance:
        cond["guidance"] = torch.tensor([[1.5, 0.0, 1.0]]).expand(2, -1)
    given = {"class_labels": [0, 2], "guidance_scale": 1.5, "latents": noise, "output_type": "latent"}
    for steps in (1, 2, 5):
        drawn = pipe(**given, num_inference_steps=steps).images
        config = SampleConfig(sampler="average", num_steps=steps, guidance=1.5)
        torch.testing.assert_close(
            drawn, sample(network, process, config, lambda: noise, cond, uncond), rtol=0, atol=1e-5
        )
    with pytest.raises(InputError, match=r"sample.reuse must be 'none' with sample.sampler 'average', got '1:2'"):
        pipe(**given, reuse="1:2")
    pipe.scheduler = make_scheduler(ProcessConfig(), "heun")
    drawn = pipe(**given, num_inference_steps=8).images
    config = SampleConfig(sampler="heun", num_steps=8, guidance=1.5)
    torch.testing.assert_close(drawn, sample(network, process, config, lambda: noise, cond, uncond), rtol=0, atol=1e-4)
