"""Speed of a training step: `python benchmarks/train.py --models S/2`.

All arms of a model start from the same weights and see the same images, times and noise; on a CPU a step of each in
turn, on a GPU one arm after the other, since its memory does not hold all. A step is the whole of it: gradients,
optimizer and average of the weights. The first arm does it as the reference code does: attention in fp32, concatenated
skips, AdamW and EMA parameter by parameter, the loss read at every step; fp32 on a CPU, and on a GPU half precision
and checkpointing. The peers are diffusers' DiT of the same width, depth and patches, and its U-Net with as many FLOPs,
both in the same step as ours. Images are random and already there: the loader has its own benchmark. Writes
benchmarks/results/train.json as it goes, beside what the file has of other models, and prints the table.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, UNet2DModel
from einops import rearrange
from measure import (
    TRAINING_PASSES,
    best_device,
    forward_flops,
    load_result,
    median_times,
    plain_config,
    save_result,
    seconds_of,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from uvit import Config, UViT, UViTConfig
from uvit.common.cli import parse, run
from uvit.config import OptimConfig
from uvit.data.batch import Batch
from uvit.networks.attention import attention
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.layers import Attention
from uvit.networks.runtime import compile_model, resolve_precision
from uvit.training.optim import build_optimizer
from uvit.training.step import compute_gradients, mean_over_processes, step_seed, training_loss
from uvit.weights.published import ADAMW

Model = Literal["digits", "photos", "S/2", "L/2", "H/2"]
CONFIGS: dict[Model, str] = {
    "digits": "digits",
    "photos": "photos",
    "S/2": "cifar10_uvit_small",
    "L/2": "imagenet256_uvit_large",
    "H/2": "imagenet256_uvit_huge",
}
CPU_BATCHES: dict[Model, int] = {"digits": 64, "photos": 16, "S/2": 8, "L/2": 1, "H/2": 1}
GPU_BATCH = 128
NUM_BATCHES = 4
MATRIX_SIZE = {"cpu": 2_048, "cuda": 8_192}
Step = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    models: tuple[Model, ...] = ("digits", "photos", "S/2")
    """Models to time."""
    arms: tuple[str, ...] = ()
    """Arms to time, besides the first; all where none are given."""
    batch_size: int | None = None
    """Images of a step; by model and device where not given."""
    rounds: int = 15
    """Timings of each arm, of which the median counts."""
    steps_per_round: int = 1
    """Steps of one timing."""
    warm_up: int = 3
    """Steps of each arm before, not timed; compilation falls into the first."""
    threads: int = 0
    """CPU threads; 0 is PyTorch's choice."""


class Peer(nn.Module):
    """A network of diffusers behind our arguments."""

    blocks = ()  # none is compiled

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        labels = torch.zeros_like(timesteps, dtype=torch.long) if y is None else y  # a DiT always takes some
        return self.network(x, timesteps, class_labels=labels).sample


def build_dit(config: Config) -> nn.Module:
    """Builds a DiT of the same width, depth, heads and patches."""
    model = config.model
    network = DiTTransformer2DModel(
        num_attention_heads=model.num_heads,
        attention_head_dim=model.embed_dim // model.num_heads,
        in_channels=model.in_chans,
        out_channels=model.in_chans,
        num_layers=model.depth + 1,
        sample_size=model.image_shape[0],
        patch_size=model.patch_size,
        num_embeds_ada_norm=model.num_classes or 1,
    )
    return Peer(network)


def build_unet(config: Config, channels: int) -> nn.Module:
    """Builds a U-Net with attention at half and a quarter of the resolution."""
    model = config.model
    network = UNet2DModel(
        sample_size=model.image_shape[0],
        in_channels=model.in_chans,
        out_channels=model.in_chans,
        block_out_channels=(channels, 2 * channels, 2 * channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=model.num_classes + model.null_class or 1,
    )
    return Peer(network)


def training_flops(build: Callable[[], nn.Module], config: Config) -> float:
    """Counts the FLOPs of training on one image."""
    with torch.device("meta"):
        network = build().eval()
    return TRAINING_PASSES * forward_flops(network, config.model)


def unet_channels(config: Config, flops: float) -> int:
    """Returns the width, a multiple of 8, at which the U-Net's FLOPs are nearest to these."""
    costs = {width: training_flops(lambda: build_unet(config, width), config) for width in range(8, 521, 8)}  # noqa: B023
    return min(costs, key=lambda width: abs(costs[width] - flops))


def make_batches(config: Config, batch_size: int, device: torch.device) -> Iterator[Batch]:
    """Yields the same few random batches again and again."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.model.in_chans, *config.model.image_shape)
    batches = [
        Batch(
            torch.randint(256, shape, generator=generator, dtype=torch.uint8),
            torch.randint(max(1, config.model.num_classes), (batch_size,), generator=generator),
            captions=[],
        ).to(device)
        for _ in range(NUM_BATCHES)
    ]
    return itertools.cycle(batches)


class PaperAttention(Attention):
    """Attention as the reference code casts it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B L H D", K=3, H=self.num_heads)
        with torch.autocast(x.device.type, enabled=False):
            x = attention(self.q_norm(q).float(), self.k_norm(k).float(), v.float(), "sdpa")
        return self.proj(rearrange(x, "B L H D -> B L (H D)"))


class PaperMerge(nn.Linear):
    """Merges a long skip through a copy of both."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, skip], dim=-1))


def swap_in_paper_parts(model: UViT) -> None:
    """Puts the reference code's attention and merges in the places of ours, with the same weights."""
    dim = model.config.embed_dim
    with torch.device("meta"):  # their own weights are never used
        parts = {
            name: PaperAttention(model.config) if name.endswith("attn") else PaperMerge(2 * dim, dim)
            for name, _ in model.named_modules()
            if name.endswith(("attn", "skip_linear"))
        }
    for name, part in parts.items():
        part.load_state_dict(model.get_submodule(name).state_dict(), assign=True)
        model.set_submodule(name, part)


def paper_step(model: UViT, config: Config, batches: Iterator[Batch], device: torch.device) -> Step:
    """Makes the reference code's step."""
    on_gpu = device.type == "cuda"
    swap_in_paper_parts(model)
    model.config = dataclasses.replace(model.config, gradient_checkpointing=on_gpu)
    average = copy.deepcopy(model)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        model.parameters(), optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, foreach=False
    )
    generator, numbers = torch.Generator(device), itertools.count()

    def step() -> float:
        generator.manual_seed(step_seed(config.train.seed, next(numbers), 0, 0))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = training_loss(model, config, NO_ENCODERS, next(batches), generator)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters()):
                mean.copy_(config.train.ema_decay * mean + (1 - config.train.ema_decay) * parameter)
        return loss.item()

    return step


def our_step(model: nn.Module, config: Config, batches: Iterator[Batch], accelerator: Accelerator) -> Step:
    """Makes the step of train.py."""
    ema = ModelEmaV3(model, decay=config.train.ema_decay)
    compile_model(model, config.train.compile)
    network, optimizer = accelerator.prepare(model, build_optimizer(model, config.optim))
    generator, numbers = torch.Generator(accelerator.device), itertools.count()

    def step() -> float:
        gradients = compute_gradients(accelerator, network, config, NO_ENCODERS, batches, generator, next(numbers))
        loss, *_ = mean_over_processes(accelerator, *gradients, 0)
        optimizer.step()
        ema.update(model)
        optimizer.zero_grad()
        return loss

    return step


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of one large product."""
    size = MATRIX_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_times({"": lambda: a @ b}, 10)[""]


def warm_up(make: Callable[[], Step], steps: int, device: torch.device, row: dict[str, Any]) -> Step:
    """Makes an arm's step and runs it a few times; notes what the first one takes, and the most memory of all."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = make()
    row["first_step_seconds"] = seconds_of(step)
    for _ in range(steps - 1):
        step()
    if device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return step


def repeated(step: Step, times: int, losses: list[float]) -> Callable[[], None]:
    """Makes one timing: so many steps, whose losses are kept."""
    return lambda: losses.extend(step() for _ in range(times))


def time_model(
    name: Model, given: Arguments, device: torch.device, on_figures: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Times all arms of one model.

    Args:
        name: the model.
        given: what to time, and how often.
        device: where.
        on_figures: called with the figures so far after each group of arms.

    Returns:
        The figures.
    """
    config = plain_config(CONFIGS[name])
    batch_size = given.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCHES[name])
    muon = dataclasses.replace(
        config.optim if config.optim.name == "muon" else OptimConfig(name="muon"), decay="constant"
    )
    config = dataclasses.replace(
        config,
        # Pixels of as many channels stand in for latents.
        data=dataclasses.replace(config.data, autoencoder=None, flip=False),
        optim=dataclasses.replace(ADAMW, warmup_steps=0),
        train=dataclasses.replace(config.train, batch_size=batch_size, compile="no"),
        model=dataclasses.replace(config.model, gradient_checkpointing=False),
    )
    precision = resolve_precision("auto", device.type, config.model.width)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")

    def build(model: UViTConfig = config.model) -> UViT:
        torch.manual_seed(0)
        return UViT(model)

    def compiled(how: str) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, compile=how))

    flops = training_flops(build, config)
    width = unet_channels(config, flops) if not given.arms or "U-Net" in given.arms else 0

    def on_device(build: Callable[[], nn.Module]) -> Any:
        with device:
            return build().train()

    def ours(config: Config, build: Callable[[], nn.Module] = build) -> Callable[[], Step]:
        return lambda: our_step(on_device(build), config, make_batches(config, batch_size, device), accelerator)

    checkpointing = dataclasses.replace(config.model, gradient_checkpointing=True)
    arms: dict[str, Callable[[], Step]] = {
        "ours": ours(config),
        "ours, again": ours(config),
        "ours, blocks compiled": ours(compiled("blocks")),
        "ours, model compiled": ours(compiled("model")),
        **({"ours, CUDA graphs": ours(compiled("graphs"))} if device.type == "cuda" else {}),
        "ours, checkpointing": ours(config, lambda: build(checkpointing)),
        "ours, Muon": ours(dataclasses.replace(config, optim=muon)),
        "DiT": ours(config, lambda: build_dit(config)),
        "U-Net": ours(config, lambda: build_unet(config, width)),
    }
    wanted = {arm: make for arm, make in arms.items() if not given.arms or arm in given.arms}
    builders: dict[str, Callable[[], nn.Module]] = {
        "DiT": lambda: build_dit(config),
        "U-Net": lambda: build_unet(config, width),
    }

    def paper() -> Step:
        return paper_step(on_device(build), config, make_batches(config, batch_size, device), device)

    rate = matrix_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    rows: dict[str, dict[str, Any]] = {}
    figures = {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "gflops_per_image": flops / 1e9,
        "matrix_tflops_per_second": rate / 1e12,
        "unet_channels": width,
        "arms": rows,
    }
    makers: dict[str, Callable[[], Step]] = {"paper-style": paper, **wanted}
    groups = [[arm] for arm in makers] if device.type == "cuda" else [list(makers)]
    losses: dict[str, list[float]] = {arm: [] for arm in makers}
    with tqdm(total=given.rounds * len(groups), desc=name, unit="round") as bar:
        for group in groups:
            try:
                steps = {arm: warm_up(makers[arm], given.warm_up, device, rows.setdefault(arm, {})) for arm in group}
                timed = {arm: repeated(steps[arm], given.steps_per_round, losses[arm]) for arm in group}
                times = median_times(timed, given.rounds, warm_up=0, on_round=bar.update)
            except torch.OutOfMemoryError:
                if "paper-style" in group:
                    raise
                times = {}
                rows |= {arm: {"out_of_memory": True} for arm in group}
            for arm, seconds in times.items():
                flops_per_image = training_flops(builders.get(arm, build), config)
                images_per_second = rows[arm]["images_per_second"] = batch_size * given.steps_per_round / seconds
                rows[arm] |= {
                    "steps_per_second": images_per_second / batch_size,
                    "speed_ratio": images_per_second / rows["paper-style"]["images_per_second"],
                    "model_flop_utilisation": flops_per_image * images_per_second / rate,
                }
                if arm not in ("DiT", "U-Net", "ours, Muon"):
                    pairs = zip(losses[arm], losses["paper-style"])
                    rows[arm]["largest_loss_difference"] = max(abs(a - b) / b for a, b in pairs)
            on_figures(figures)
            steps, timed = {}, {}
            accelerator.free_memory()
            torch.compiler.reset()  # CUDA graphs keep their memory
            gc.collect()
            torch.cuda.empty_cache()
    accelerator.state._reset_state(True)  # the next model may run in another precision
    return figures


def main(arguments: list[str]) -> None:
    """Times all models and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    device = best_device()
    models: dict[str, Any] = load_result("train").get("models", {})
    for name in given.models:
        models[name] = time_model(
            name, given, device, lambda figures, name=name: save_result("train", {"models": {**models, name: figures}})
        )
    print("| model | arm | images/s | x paper-style | share of the matrix rate | memory, GB | first step, s |")
    print("|---|---|---|---|---|---|---|")
    for name in given.models:
        model = models[name]
        for arm, row in model["arms"].items():
            begin = f"| {name}, batch {model['batch_size']}, {model['precision']} | {arm} | "
            if "out_of_memory" in row:
                print(f"{begin}out of memory | | | | |")
                continue
            memory = f"{row['peak_memory_gb']:.1f}" if "peak_memory_gb" in row else ""
            print(
                f"{begin}{row['images_per_second']:.4g} | {row['speed_ratio']:.2f} "
                f"| {row['model_flop_utilisation']:.0%} | {memory} | {row['first_step_seconds']:.1f} |"
            )


if __name__ == "__main__":
    run(main)
