"""Speed of a U-Net's training step: `python benchmarks/unet.py`.

DDPM's network for CIFAR-10 at 32x32, of about the parameters of U-ViT-S/2: ours, diffusers' UNet2DModel of the same
layers and, where `--published` names a checkout of openai/guided-diffusion, that code with the same weights, in fp32
alone. Arms take turns; a step is the prediction, its mean squared error, the gradients, and AdamW. Writes
benchmarks/results/unet.json and prints the table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from measure import best_device, forward_flops, median_times, save_result
from torch import Tensor, nn
from tqdm import tqdm

from uvit import UNet, UNetConfig
from uvit.common.cli import parse, run
from uvit.common.errors import InputError
from uvit.networks.runtime import resolve_precision, set_up_process

CONFIG = UNetConfig(
    img_size=32,
    model_channels=128,
    channel_mult=(1, 2, 2, 2),
    num_res_blocks=2,
    attention_sizes=(16,),
    num_heads=1,
    head_dim=0,
    scale_shift_norm=False,
    resblock_updown=False,
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    published: Path | None = None
    """Checkout of openai/guided-diffusion to time, too."""
    batch_size: int = 4
    """Images of a step."""
    rounds: int = 15
    """Timings of each arm, of which the median counts."""
    threads: int = 0
    """CPU threads; 0 is PyTorch's choice."""


class Peer(nn.Module):
    """A network of diffusers behind our arguments."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x, timesteps).sample


def build_diffusers() -> nn.Module:
    """Builds diffusers' network of the same layers."""
    attends = [CONFIG.image_shape[0] >> level in CONFIG.attention_sizes for level in range(len(CONFIG.channel_mult))]
    width = CONFIG.model_channels
    return Peer(
        UNet2DModel(
            sample_size=CONFIG.img_size,
            block_out_channels=tuple(int(width * mult) for mult in CONFIG.channel_mult),
            layers_per_block=CONFIG.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
            up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
            attention_head_dim=None,  # one head
        )
    )


def build_published(checkout: Path) -> nn.Module:
    """Builds the published code's network.

    Raises:
        InputError: the folder is no checkout of it.
    """
    if not (checkout / "guided_diffusion" / "unet.py").is_file():
        raise InputError(f"published must be a checkout of openai/guided-diffusion, got {checkout}")
    sys.path.insert(0, str(checkout))
    return importlib.import_module("guided_diffusion.unet").UNetModel(
        image_size=CONFIG.img_size,
        in_channels=CONFIG.in_chans,
        model_channels=CONFIG.model_channels,
        out_channels=CONFIG.predicted_chans,
        num_res_blocks=CONFIG.num_res_blocks,
        attention_resolutions=tuple(CONFIG.image_shape[0] // side for side in CONFIG.attention_sizes),
        channel_mult=CONFIG.channel_mult,
        num_heads=CONFIG.num_heads,
    )


def step_of(network: nn.Module, x: Tensor, precision: str) -> Callable[[], None]:
    """Makes a training step of a network that predicts x itself."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    timesteps = torch.linspace(0, 999, len(x), device=x.device)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            prediction = network(x, timesteps)
        optimizer.zero_grad()
        nn.functional.mse_loss(prediction.float(), x).backward()
        optimizer.step()

    return step


def main(arguments: Sequence[str]) -> None:
    """Times the arms and prints the table."""
    given, device = parse(Arguments, arguments, __doc__), best_device()
    set_up_process(given.threads)
    torch.manual_seed(0)
    ours = UNet(CONFIG)
    networks: dict[str, nn.Module] = {"ours": ours, "diffusers": build_diffusers()}
    if given.published:
        networks["published code"] = build_published(given.published)
        networks["published code"].load_state_dict(ours.state_dict())
    figures = {
        name: {
            "parameters": sum(each.numel() for each in network.parameters()),
            "gflops": forward_flops(network, CONFIG) / 1e9,
        }
        for name, network in networks.items()
    }
    x = torch.randn(given.batch_size, CONFIG.in_chans, *CONFIG.image_shape, device=device)
    for precision in dict.fromkeys(("no", resolve_precision("auto", device.type, CONFIG.width))):
        if precision != "no":
            networks.pop("published code", None)  # its checkpointing runs again without autocast
        steps = {name: step_of(network.to(device), x, precision) for name, network in networks.items()}
        with tqdm(total=given.rounds, unit="round", desc=f"mixed_precision {precision}") as progress:
            times = median_times(steps, given.rounds, on_round=progress.update)
        for name, seconds in times.items():
            figures[name][f"step_seconds_{precision}"] = seconds
            print(f"{name:<16} {precision:<5} {1000 * seconds:8.0f} ms/step {seconds / times['ours']:6.2f} x ours")
    save_result("unet", {"batch_size": given.batch_size, "arms": figures})


if __name__ == "__main__":
    run(main)
