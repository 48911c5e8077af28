"""Golden values of the reference implementation (fp32, CPU), and the rule by which its weights and inputs were made."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from uvit import UNet, UNetConfig, UViT, UViTConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)
FOLDER = Path(__file__).parent.parent / "goldens"
FACTS = json.loads((FOLDER / "uvit.json").read_text())
ARRAYS = np.load(FOLDER / "uvit.npz")
UNET_FACTS = json.loads((FOLDER / "unet.json").read_text())
UNET_ARRAYS = np.load(FOLDER / "unet.npz")


def rnd(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))


def config_of(published: dict) -> UViTConfig:
    """Our config of a published constructor's arguments."""
    fields = dict(published)
    fields["num_classes"] = max(fields.get("num_classes", 0), 0)
    fields["conv"] = "image" if fields.get("conv", True) else "none"
    fields["skip"] = "concat" if fields.get("skip", True) else "none"
    fields["context_dim"] = fields.pop("clip_dim", 0)
    fields["num_context_tokens"] = fields.pop("num_clip_token", 0)
    return UViTConfig(**fields)


def with_golden_weights(module: ModuleT) -> ModuleT:
    """Gives a network, or a part of one, weights by the rule; none of them is zero."""
    weights = {}
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        if name == "pos_embed":
            weights[name] = 0.5 * rnd(name, shape)
        elif len(shape) == 1:
            weights[name] = 1 + 0.1 * rnd(name, shape) if name.endswith("weight") else 0.1 * rnd(name, shape)
        elif name == "label_emb.weight" and isinstance(module, UNet):
            weights[name] = rnd(name, shape)
        else:
            weights[name] = rnd(name, shape) / float(np.sqrt(np.prod(shape[1:])))
    module.load_state_dict(weights)
    return module


def golden_model(case: str) -> UViT:
    return with_golden_weights(UViT(config_of(FACTS["cases"][case]["kwargs"])))


def unet_config_of(published: dict) -> UNetConfig:
    """Our config of the arguments of ADM's constructor."""
    side = published["image_size"]
    return UNetConfig(
        img_size=side,
        in_chans=published["in_channels"],
        out_chans=published["out_channels"],
        model_channels=published["model_channels"],
        channel_mult=tuple(published["channel_mult"]),
        num_res_blocks=published["num_res_blocks"],
        attention_sizes=tuple(side // factor for factor in published["attention_resolutions"]),
        num_heads=published["num_heads"],
        head_dim=max(published["num_head_channels"], 0),
        qkv_order="new" if published["use_new_attention_order"] else "legacy",
        scale_shift_norm=published["use_scale_shift_norm"],
        resblock_updown=published["resblock_updown"],
        num_classes=published["num_classes"] or 0,
    )


def golden_unet(case: str) -> UNet:
    return with_golden_weights(UNet(unet_config_of(UNET_FACTS["cases"][case]["kwargs"])))


def golden_unet_inputs(config: UNetConfig) -> dict[str, Tensor]:
    inputs = {"x": rnd("x", (2, config.in_chans, *config.image_shape)), "timesteps": torch.tensor([1.0, 998.0])}
    if config.num_classes:
        inputs["y"] = (torch.arange(2) * 7 + 3) % config.num_classes
    if config.context_dim:
        inputs["context"] = rnd("context", (2, config.num_context_tokens, config.context_dim))
    return inputs


def golden_inputs(case: str) -> dict[str, Tensor]:
    batch, config = FACTS["cases"][case]["batch"], config_of(FACTS["cases"][case]["kwargs"])
    inputs = {
        "x": rnd("x", (batch, config.in_chans, *config.image_shape)),
        "timesteps": torch.linspace(1, 998.5, batch) if batch > 1 else torch.tensor([417.25]),
    }
    if config.num_classes:
        inputs["y"] = (torch.arange(batch) * 7 + 3) % config.num_classes
    if config.context_dim:
        inputs["context"] = rnd("context", (batch, config.num_context_tokens, config.context_dim))
    return inputs
