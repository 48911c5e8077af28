"""The published models: sizes and shared parts of the recipes of the paper's, and inferring a config from weights.

All are Worth Words, arXiv 2209.12152, tables 1, 8 and 9. configs/ has one config file for each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import NetworkConfig, OptimConfig, ProcessConfig, UNetConfig, UViTConfig, replace_fields
from uvit.weights.adm import IMAGENET_CLASSES, PUBLISHED_ADM, infer_unet_config, is_unet

SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "small_deep": {"embed_dim": 512, "depth": 16, "num_heads": 8},
    "mid": {"embed_dim": 768, "depth": 16, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 20, "num_heads": 16},
    "huge": {"embed_dim": 1152, "depth": 28, "num_heads": 16},
}
RANKS = {
    "pos_embed": 3,
    "patch_embed.proj.weight": 4,
    "in_blocks.0.mlp.fc1.weight": 2,
    "label_emb.weight": 2,
    "context_embed.weight": 2,
}
"""Number of dimensions of the tensors that the config is inferred from."""
CLIP_CONTEXT = {"context_dim": 768, "num_context_tokens": 77}
IMAGENET256_LATENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 2,
    "in_chans": 4,
    "num_classes": IMAGENET_CLASSES,
    "null_class": True,
}
IMAGENET512_LATENTS = {**IMAGENET256_LATENTS, "img_size": 64, "patch_size": 4}
IMAGENET64: dict[str, Any] = {"img_size": 64, "patch_size": 4, "num_classes": IMAGENET_CLASSES}
MSCOCO_LATENTS: dict[str, Any] = {"img_size": 32, "patch_size": 2, "in_chans": 4, **CLIP_CONTEXT}

PUBLISHED_UVIT: dict[str, UViTConfig] = {
    "cifar10_uvit_small": UViTConfig(**SIZES["small"], img_size=32, patch_size=2),
    "celeba64_uvit_small": UViTConfig(**SIZES["small"], img_size=64, patch_size=4),
    "imagenet64_uvit_mid": UViTConfig(**SIZES["mid"], **IMAGENET64),
    "imagenet64_uvit_large": UViTConfig(**SIZES["large"], **IMAGENET64),
    "imagenet256_uvit_large": UViTConfig(**SIZES["large"], **IMAGENET256_LATENTS),
    "imagenet256_uvit_huge": UViTConfig(**SIZES["huge"], **IMAGENET256_LATENTS, conv="none"),
    "imagenet512_uvit_large": UViTConfig(**SIZES["large"], **IMAGENET512_LATENTS),
    "imagenet512_uvit_huge": UViTConfig(**SIZES["huge"], **IMAGENET512_LATENTS, conv="none"),
    "mscoco_uvit_small": UViTConfig(**SIZES["small"], **MSCOCO_LATENTS),
    "mscoco_uvit_small_deep": UViTConfig(**SIZES["small_deep"], **MSCOCO_LATENTS),
}
"""The network of each of the paper's runs, by the name of its config: the data, then the size."""

PUBLISHED: dict[str, UViTConfig | UNetConfig] = {**PUBLISHED_UVIT, **PUBLISHED_ADM}
"""The network of every published model, by the name of its config."""

# Stable Diffusion's autoencoder, and the one of which only the decoder was fine-tuned: both encode alike.
SD_AUTOENCODER = "CompVis/stable-diffusion-v1-4/vae"
SD_AUTOENCODER_EMA = "stabilityai/sd-vae-ft-ema"

VP_NOISE = ProcessConfig(schedule="vp", prediction="noise")
LDM_NOISE = ProcessConfig(schedule="ldm", prediction="noise")
ADAMW = OptimConfig(name="adamw", lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup_steps=5_000)


def config_class_of(weights: Mapping[str, Tensor]) -> type[NetworkConfig]:
    """Returns the kind of config that a published model has, by the names of its tensors."""
    return UNetConfig if is_unet(weights) else UViTConfig


def infer_config(weights: Mapping[str, Tensor], **known: Any) -> NetworkConfig:
    """Infers the config of a published model from its tensors.

    Args:
        weights: a state dict with the published names.
        **known: fields of the config that the tensors do not determine.

    Raises:
        InputError: as infer_uvit_config and infer_unet_config.
    """
    return infer_unet_config(weights, **known) if is_unet(weights) else infer_uvit_config(weights, **known)


def infer_uvit_config(weights: Mapping[str, Tensor], **known: Any) -> UViTConfig:
    """Infers the config of a published U-ViT from its tensors.

    Args:
        weights: a state dict with the published names.
        **known: fields of UViTConfig that the tensors do not determine, or that are guessed wrong: the heads of a width
            that was not published, a context that is not CLIP's 77 tokens, an image that is not square.

    Raises:
        InputError: tensors that are not a U-ViT's, or that do not determine a size which is not given.
    """
    needed = ("pos_embed", "patch_embed.proj.weight", "in_blocks.0.mlp.fc1.weight", "decoder_pred.weight")
    missing = [name for name in needed if name not in weights]
    if missing:
        raise InputError(f"not the weights of a U-ViT: there is no tensor {missing[0]!r}")
    for name, rank in RANKS.items():
        if name in weights and (weights[name].ndim != rank or 0 in weights[name].shape):
            shape = tuple(weights[name].shape)
            raise InputError(f"not the weights of a U-ViT: {name} must have {rank} dimensions, got shape {shape}")
    width, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    is_narrow = "patch_embed.expand.weight" in weights
    embed_dim = weights["in_blocks.0.mlp.fc1.weight"].shape[1] if is_narrow else width
    fields: dict[str, Any] = {
        "patch_size": patch_size,
        "in_chans": in_chans,
        "patch_bottleneck": width if is_narrow else 0,
        "embed_dim": embed_dim,
        "depth": 2 * len({name.split(".")[1] for name in weights if name.startswith("in_blocks.")}),
        "mlp_ratio": weights["in_blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "qkv_bias": "in_blocks.0.attn.qkv.bias" in weights,
        "mlp_time_embed": "time_embed.0.weight" in weights,
        "conv": "image" if "final_layer.weight" in weights else "none",
        "skip": "concat" if "out_blocks.0.skip_linear.weight" in weights else "none",
    }
    if "label_emb.weight" in weights:
        rows = weights["label_emb.weight"].shape[0]
        null_class = known.get("null_class", rows == IMAGENET_CLASSES + 1)
        fields |= {"num_classes": rows - null_class, "null_class": null_class}
    if "context_embed.weight" in weights:
        fields |= {**CLIP_CONTEXT, "context_dim": weights["context_embed.weight"].shape[1]}
    fields |= {f"takes_{name}": f"{name}_embed.mlp.fc1.weight" in weights for name in ("interval", "guidance")}
    heads = {size["embed_dim"]: size["num_heads"] for size in SIZES.values()}
    if "num_heads" not in known:
        if embed_dim not in heads:
            raise InputError(f"num_heads must be given for embed_dim {embed_dim}, which is not a published width")
        fields["num_heads"] = heads[embed_dim]
    fields |= known
    if "img_size" not in fields:
        extras = 1 + ("num_classes" in fields) + fields.get("num_context_tokens", 0)
        extras += fields["takes_interval"] + fields["takes_guidance"]
        num_patches = weights["pos_embed"].shape[1] - extras
        side = math.isqrt(max(num_patches, 0))
        if side * side != num_patches or side == 0:
            raise InputError(f"img_size must be given: {num_patches} patches are not a square")
        fields["img_size"] = side * patch_size
    return replace_fields(UViTConfig(), fields)
