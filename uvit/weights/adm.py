"""The published ADM models, which are U-Nets: their sizes, and inferring a config from their weights.

Diffusion Models Beat GANs, arXiv 2105.05233, appendix I. configs/ has one config file for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import ProcessConfig, UNetConfig, replace_fields

IMAGENET_CLASSES = 1000
# Six channels out: the noise, and how to mix the two bounds of the variance, which only ancestral sampling uses.
SHARED: dict[str, Any] = {"out_chans": 6, "attention_sizes": (32, 16, 8), "num_classes": IMAGENET_CLASSES}
IMAGENET256: dict[str, Any] = {"img_size": 256, "model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), **SHARED}

PUBLISHED_ADM: dict[str, UNetConfig] = {
    "adm_imagenet64": UNetConfig(
        img_size=64,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        qkv_order="new",
        dropout=0.1,
        **SHARED,
    ),
    "adm_imagenet128": UNetConfig(
        img_size=128, model_channels=256, channel_mult=(1, 1, 2, 3, 4), num_heads=4, head_dim=0, **SHARED
    ),
    "adm_imagenet256": UNetConfig(**IMAGENET256),
    "adm_imagenet256_uncond": UNetConfig(**{**IMAGENET256, "num_classes": 0}),
    "adm_imagenet512": UNetConfig(**{**IMAGENET256, "img_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)}),
}
"""The network of each published model, by the name of its config; its file is called 64x64_diffusion.pt, and so on."""

DDPM_NOISE = ProcessConfig(schedule="ddpm", prediction="noise")
IDDPM_NOISE = ProcessConfig(schedule="iddpm", prediction="noise")


def is_unet(weights: Mapping[str, Tensor]) -> bool:
    """Returns whether tensors have a U-Net's names."""
    return "input_blocks.0.0.weight" in weights


def infer_unet_config(weights: Mapping[str, Tensor], **known: Any) -> UNetConfig:
    """Infers the config of a published U-Net from its tensors.

    Args:
        weights: a state dict with the published names.
        **known: fields of UNetConfig that the tensors do not determine: `img_size`, `num_heads` or `head_dim`,
            `qkv_order`, `null_class`, `num_context_tokens`. Those of a published model need not be given.

    Raises:
        InputError: tensors that are not a U-Net's, or that do not determine a size which is not given.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in weights:
            raise InputError(f"not the weights of a U-Net: there is no tensor {name!r}")
        found = tuple(weights[name].shape)
        if len(found) != rank or 0 in found:
            raise InputError(f"not the weights of a U-Net: {name} must have {rank} dimensions, got shape {found}")
        return found

    num_blocks = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    # Where a block of the decoder raises the resolution, its last layer is a convolution or a second residual block.
    raising = [
        number
        for number in range(num_blocks)
        for place in (1, 2)
        for layer in ("conv", "in_layers.0")
        if f"output_blocks.{number}.{place}.{layer}.weight" in weights
    ]
    num_res_blocks = raising[0] if raising else num_blocks - 1
    _, model_channels = shape("time_embed.0.weight", 2)
    first_blocks = [f"input_blocks.{level * (num_res_blocks + 1) + 1}" for level in range(len(raising) + 1)]
    widths = [shape(f"{block}.0.out_layers.3.weight", 4)[0] for block in first_blocks]
    embedded, _ = shape("input_blocks.1.0.emb_layers.1.weight", 2)
    (joined,) = shape("output_blocks.0.0.in_layers.0.weight", 1)
    attends = [
        any(f"{block}.1.{layer}" in weights for layer in ("qkv.weight", "proj_in.weight")) for block in first_blocks
    ]
    fields: dict[str, Any] = {
        "in_chans": shape("input_blocks.0.0.weight", 4)[1],
        "out_chans": shape("out.2.weight", 4)[0],
        "model_channels": model_channels,
        "channel_mult": tuple(width / model_channels for width in widths),
        "num_res_blocks": num_res_blocks,
        "scale_shift_norm": embedded == 2 * widths[0],
        "resblock_updown": f"input_blocks.{num_res_blocks + 1}.0.op.weight" not in weights,
        "skips": joined > widths[-1],
    }
    if "label_emb.weight" in weights:
        null_class = known.get("null_class", False)
        fields |= {"num_classes": shape("label_emb.weight", 2)[0] - null_class, "null_class": null_class}
    keys = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    if keys in weights:
        fields["context_dim"] = shape(keys, 2)[1]
    sizes = ("model_channels", "channel_mult", "num_res_blocks")
    published = [each for each in PUBLISHED_ADM.values() if all(getattr(each, name) == fields[name] for name in sizes)]
    if published:
        undetermined = ("img_size", "num_heads", "head_dim", "qkv_order", "dropout")
        fields |= {name: getattr(published[0], name) for name in undetermined}
    fields |= known
    for names in (("img_size",), ("num_heads", "head_dim")):
        if not any(name in fields for name in names):
            needed = " or ".join(names)
            raise InputError(
                f"{needed} must be given for widths {', '.join(map(str, widths))}, which are not published"
            )
    if "num_heads" in known and "head_dim" not in known:
        fields["head_dim"] = 0
    if "attention_sizes" not in known:
        side = fields["img_size"] if isinstance(fields["img_size"], int) else min(fields["img_size"])
        fields["attention_sizes"] = tuple(side >> level for level, each in enumerate(attends) if each)
    return replace_fields(UNetConfig(), fields)
