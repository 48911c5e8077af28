"""U-Net: residual convolutions at several resolutions, attention at the low ones, long skips from encoder to decoder.

The diffusion U-Net of "Diffusion Models Beat GANs" (Dhariwal & Nichol, arXiv 2105.05233), of which DDPM's (arXiv
2006.11239) is a case, with the cross-attention of latent diffusion (arXiv 2112.10752). Parameter names are those of the
published checkpoints. This file knows only tensors; `uvit.weights.build` adds loading and saving.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from uvit.config import TIME_WIDTHS, InputError, UNetConfig, replace_fields
from uvit.networks.backbone import Backbone, embed_labels
from uvit.networks.layers import timestep_embedding, zeroed
from uvit.networks.unet_layers import (
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Stage,
    Upsample,
    average_pixels,
    repeat_pixels,
)

UNetType = TypeVar("UNetType", bound="UNet")


class UNet(Backbone):
    """The diffusion U-Net.

    Args:
        config: sizes and options; None takes UNetConfig's defaults.
        **fields: fields of UNetConfig that override `config`.

    Raises:
        InputError: (a ValueError) sizes that do not fit together, with both values.

    Example:
        >>> import torch
        >>> model = UNet(img_size=32, model_channels=64, channel_mult=(1, 2, 2), attention_sizes=(16,), num_classes=10)
        >>> noise = model(torch.randn(4, 3, 32, 32), torch.full((4,), 500.0), y=torch.tensor([0, 1, 2, 3]))
        >>> noise.shape
        torch.Size([4, 3, 32, 32])
    """

    config_class: ClassVar[type[UNetConfig]] = UNetConfig
    # Muon orthogonalises the matrices inside the blocks; embeddings, the first and the last convolution are AdamW's.
    muon_fallback: ClassVar[tuple[str, ...]] = (
        "time_embed.*",
        "label_emb.*",
        "interval_embed.*",
        "guidance_embed.*",
        "input_blocks.0.*",
        "out.*",
    )

    def __init__(self, config: UNetConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if not isinstance(config, UNetConfig | None):
            raise InputError(f"config must be a UNetConfig, got {config!r:.80}: give sizes by name, as in img_size=32")
        self.config = config = replace_fields(config or UNetConfig(), fields)
        width = TIME_WIDTHS * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, width), nn.SiLU(), nn.Linear(width, width))
        self._add_number_embeds(config.model_channels, width)
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes + config.null_class, width)

        attend = SpatialTransformer if config.context_dim else AttentionBlock
        first, *_ = levels = config.levels
        channels = first.channels
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_chans, channels, 3, padding=1))])
        skip_channels = [channels]
        for level in levels:
            if level is not first:
                self.input_blocks.append(
                    Stage(
                        ResBlock(config, channels, channels, average_pixels)
                        if config.resblock_updown
                        else Downsample(channels)
                    )
                )
                skip_channels.append(channels)
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(config, channels, level.channels)]
                channels = level.channels
                layers += [attend(config, channels)] if level.attends else []
                self.input_blocks.append(Stage(*layers))
                skip_channels.append(channels)

        self.middle_block = Stage(
            ResBlock(config, channels, channels), attend(config, channels), ResBlock(config, channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for number in range(config.num_res_blocks + 1):
                joined = skip_channels.pop() if config.skips else 0
                layers = [ResBlock(config, channels + joined, level.channels)]
                channels = level.channels
                layers += [attend(config, channels)] if level.attends else []
                if number == config.num_res_blocks and level is not first:
                    layers.append(
                        ResBlock(config, channels, channels, repeat_pixels)
                        if config.resblock_updown
                        else Upsample(channels)
                    )
                self.output_blocks.append(Stage(*layers))

        last = zeroed(nn.Conv2d(channels, config.predicted_chans, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(channels), nn.SiLU(), last)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [*self.input_blocks, self.middle_block, *self.output_blocks]

    def _embed(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        context: Tensor | None,
        interval: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the images, and all that is embedded but the context, (B, 4 model_channels), with the context."""
        time = timestep_embedding(timesteps.expand(x.shape[0]), self.config.model_channels)  # (B, model_channels)
        embedding = self.time_embed(time.to(self.weight_dtype))  # (B, 4 model_channels)
        embedding = sum(self._embed_numbers(x, interval, guidance), embedding)
        if y is not None:
            embedding = embedding + embed_labels(self.label_emb, y)
        return x, (embedding, context)

    def _to_image(self, h: Tensor) -> Tensor:
        return self.out(h)  # (B, predicted_chans, H, W)

    def resize(self: UNetType, img_size: int | tuple[int, int]) -> UNetType:
        """Changes the image size in place: convolutions take any, and attention stays at the same levels.

        Args:
            img_size: new side in pixels, or (height, width), which can be halved as often as there are levels.

        Returns:
            The model itself.

        Raises:
            InputError: (a ValueError) a size that cannot be halved so often.
        """
        config = dataclasses.replace(self.config, img_size=img_size, attention_sizes=())
        sizes = tuple(min(new.shape) for new, old in zip(config.levels, self.config.levels) if old.attends)
        self.config = dataclasses.replace(config, attention_sizes=sizes)
        return self
