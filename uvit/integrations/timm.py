"""Adds the published U-ViTs to timm's registry on import: `import uvit.integrations.timm`.

Names follow timm: `uvit_small_patch2_32` is a size, its patch size and the side of its images (or latents); a tag names
the data where several published models share a name, as in `uvit_large_patch4_64.imagenet512`. The published weights
have no permanent URL, so none can be downloaded. U-Nets are not in it: `uvit.UNet.from_pretrained` loads them.

>>> import timm, uvit.integrations.timm
>>> model = timm.create_model("uvit_small_patch2_32", checkpoint_path="cifar10_uvit_small.pth")
>>> features = timm.create_model("uvit_small_patch2_32", features_only=True, out_indices=(6,))
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from uvit.common.errors import InputError
from uvit.config import UViTConfig
from uvit.weights.build import UViT
from uvit.weights.published import PUBLISHED_UVIT


def _timm_name(run: str, config: UViTConfig) -> tuple[str, str]:
    """Returns timm's (architecture, tag) of a published run: `cifar10_uvit_small` is uvit_small_patch2_32.cifar10."""
    tag, _, size = run.partition("_")
    return f"{size}_patch{config.patch_size}_{config.img_size}", tag


def _pretrained_cfg(config: UViTConfig) -> dict[str, Any]:
    """Returns timm's facts about a model: its input, and no URL of weights."""
    pixels = config.in_chans == 3  # in [-1, 1]; latents come as they are
    return {
        "url": "",
        "input_size": (config.in_chans, *config.image_shape),
        "fixed_input_size": True,
        "num_classes": config.num_classes,
        "mean": (0.5 if pixels else 0.0,) * config.in_chans,
        "std": (0.5 if pixels else 1.0,) * config.in_chans,
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": None,
        "paper_name": "All are Worth Words: A ViT Backbone for Diffusion Models",
        "paper_ids": "arXiv:2209.12152",
        "origin_url": "https://github.com/baofff/U-ViT",
    }


_CONFIGS = {".".join(_timm_name(run, config)): config for run, config in PUBLISHED_UVIT.items()}
"""Configs by timm's names with tags; a name without a tag means its first tag."""

default_cfgs = generate_default_cfgs({name: _pretrained_cfg(config) for name, config in _CONFIGS.items()})


def _create(architecture: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a model as timm's entry points do.

    Args:
        architecture: timm's name without a tag.
        pretrained: whether to load weights from where `pretrained_cfg_overlay` says, such as {"file": PATH}.
        **kwargs: what timm.create_model passes on, and fields of UViTConfig. `num_classes` is the number of labels that
            the model takes, 0 for none; `features_only` gives features of clean images, and `out_indices` chooses the
            blocks as in forward_intermediates, by default the last three. Deep blocks after the last chosen one are
            removed.

    Raises:
        InputError: (a ValueError) an unknown tag, fields that do not fit, or `features_only` for a model that needs
            labels or context.
    """
    given, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    tags = default_cfgs[architecture].tags
    if isinstance(given, str) and given not in tags:
        raise InputError(f"the tag of {architecture} must be one of {', '.join(tags)}, got {given!r}")
    resolved = resolve_pretrained_cfg(architecture, given, overlay)
    published = _CONFIGS[f"{architecture}.{resolved.tag if resolved.tag in tags else tags[0]}"]
    if tuple(resolved.input_size[1:]) == published.image_shape:
        kwargs.setdefault("img_size", published.img_size)  # keeps a single number
    if kwargs.get("num_classes") == 0:
        kwargs.setdefault("null_class", False)

    def build(**fields: Any) -> UViT:
        model: Any = UViT(published, **fields)
        config = model.config
        if kwargs.get("features_only") and (config.context_dim or (config.num_classes and not config.null_class)):
            raise InputError(
                "features_only needs a model without context and with a null class or no classes, got context_dim "
                f"{config.context_dim}, num_classes {config.num_classes}: use forward_intermediates of the whole model"
            )
        half = range(config.depth // 2)
        modules = [*(f"in_blocks.{n}" for n in half), "mid_block", *(f"out_blocks.{n}" for n in half)]
        facts = {"num_chs": config.embed_dim, "reduction": config.patch_size}
        model.feature_info = [{"module": name, **facts} for name in modules]
        return model

    features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(build, architecture, pretrained, feature_cfg=features, **kwargs)


def _register(architecture: str) -> None:
    """Registers an entry point of this name, which timm looks up in this module."""

    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(architecture, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = architecture
    entry_point.__doc__ = f"Builds {architecture}."
    globals()[architecture] = register_model(entry_point)


for _architecture in default_cfgs:
    _register(_architecture)
