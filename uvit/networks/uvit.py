"""U-ViT: a vision transformer that treats time, condition and patches all as tokens, with long skip connections.

"All are Worth Words: A ViT Backbone for Diffusion Models" (Bao et al., CVPR 2023, arXiv 2209.12152). Token order and
parameter names are those of the published checkpoints. This file knows only tensors; `uvit.weights.build` adds loading
and saving to make the class that users import.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any, ClassVar, Literal, TypeVar

import torch
from einops import rearrange
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from uvit.config import InputError, UViTConfig, replace_fields
from uvit.networks.backbone import Backbone, embed_labels
from uvit.networks.inputs import check_inputs, check_numbers
from uvit.networks.layers import AdaLayerNorm, Block, ConvPatchEmbed, NarrowPatchEmbed, timestep_embedding
from uvit.networks.sparse import put_tokens, take_tokens

UViTType = TypeVar("UViTType", bound="UViT")


class UViT(Backbone):
    """The U-ViT backbone.

    Args:
        config: sizes and options; None takes UViTConfig's defaults.
        **fields: fields of UViTConfig that override `config`.

    Raises:
        InputError: (a ValueError) sizes that do not fit together, with both values.

    Example:
        >>> import torch
        >>> model = UViT(img_size=32, patch_size=2, embed_dim=512, depth=12, num_heads=8, num_classes=10)
        >>> noise = model(torch.randn(4, 3, 32, 32), torch.full((4,), 500.0), y=torch.tensor([0, 1, 2, 3]))
        >>> noise.shape
        torch.Size([4, 3, 32, 32])
    """

    config_class: ClassVar[type[UViTConfig]] = UViTConfig
    # Muon orthogonalises the matrices inside the blocks; the maps to and from tokens are left to AdamW.
    muon_fallback: ClassVar[tuple[str, ...]] = (
        "patch_embed.*",
        "time_embed.*",
        "label_emb.*",
        "context_embed.*",
        "interval_embed.*",
        "guidance_embed.*",
        "gap_token",
        "pos_embed",
        "decoder_pred.*",
        "final_layer.*",
    )

    def __init__(self, config: UViTConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if not isinstance(config, UViTConfig | None):
            raise InputError(f"config must be a UViTConfig, got {config!r:.80}: give sizes by name, as in img_size=32")
        self.config = config = replace_fields(config or UViTConfig(), fields)
        dim, patch_size, in_chans = config.embed_dim, config.patch_size, config.in_chans

        if config.patch_embed == "conv":
            self.patch_embed: nn.Module = ConvPatchEmbed(config)
        elif config.patch_bottleneck:
            self.patch_embed = NarrowPatchEmbed(config)
        else:
            self.patch_embed = PatchEmbed(config.image_shape, patch_size, in_chans, dim, strict_img_size=False)
        if config.mlp_time_embed:
            self.time_embed: nn.Module = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        else:
            self.time_embed = nn.Identity()
        self._add_number_embeds(dim, dim)
        if config.num_classes:
            self.label_emb = nn.Embedding(config.num_classes + config.null_class, dim)
        if config.context_dim:
            self.context_embed = nn.Linear(config.context_dim, dim)
        self.pos_embed: Tensor
        if config.pos_embed == "learned":
            num_tokens = config.num_extra_tokens + math.prod(config.grid_shape)
            self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        else:  # on the default device, where accelerate's init_empty_weights leaves buffers
            self.register_buffer("pos_embed", self._fixed_positions(None, torch.get_default_dtype()), persistent=False)

        self.in_blocks = nn.ModuleList(Block(config) for _ in range(config.depth // 2))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, deep=True) for _ in range(config.depth // 2))

        self.norm: nn.Module = nn.LayerNorm(dim)
        self.decoder_pred: nn.Module = nn.Linear(dim, patch_size**2 * in_chans)
        if config.conv == "none":
            self.final_layer: nn.Module = nn.Identity()
        else:
            chans = in_chans if config.conv == "image" else dim
            self.final_layer = nn.Conv2d(chans, chans, 3, padding=1)
        if config.outer_pairs:
            self.gap_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.is_whole = True  # until prune_intermediate_layers removes blocks
        self._init_weights()

    def reset_buffers(self) -> None:
        """Computes the buffer that is not in the state dict: fixed positions of patches, zeros for extra tokens."""
        if self.config.pos_embed == "sincos2d":
            like = next(self.parameters())
            self.register_buffer("pos_embed", self._fixed_positions(like.device, like.dtype), persistent=False)

    def _fixed_positions(self, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        width = self.config.embed_dim
        patches = build_sincos2d_pos_embed(list(self.config.grid_shape), width, device=device)  # (N, D), row by row
        extras = torch.zeros(self.config.num_extra_tokens, width, device=device)
        return torch.cat([extras, patches])[None].to(dtype)  # (1, L, D)

    def _apply(self: UViTType, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UViTType:
        """Moves all tensors, and computes the buffer where it had no values: `to_empty` makes some up."""
        is_fixed, was_meta = self.config.pos_embed == "sincos2d", next(self.parameters()).is_meta
        without_values = is_fixed and (was_meta or self.pos_embed.is_meta)
        if without_values and not was_meta:  # as accelerate leaves it, which then moves all
            self.reset_buffers()
        super()._apply(fn, recurse)
        if without_values and not (weight := next(self.parameters())).is_meta:
            self.pos_embed = self._fixed_positions(weight.device, self.pos_embed.dtype)
        return self

    def _init_weights(self) -> None:
        """Truncated normal 0.02 for linear weights and positions; PyTorch's defaults for embeddings, convolutions."""
        if self.config.pos_embed == "learned":
            trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.outer_pairs:
            trunc_normal_(self.gap_token, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLayerNorm):
                nn.init.ones_(
                    module.proj.bias[: self.config.embed_dim]
                )  # the scale starts at 1, as in a plain LayerNorm

    def start_absent(self, names: Sequence[str]) -> int:
        """Makes inputs act as if they were absent, at first: to take on weights without them.

        Args:
            names: `interval` or `guidance`, or both.

        Returns:
            How many tokens are absent until they have faded in.
        """
        if self.config.time_conditioning == "adaln":
            return super().start_absent(names)
        self.fade_in(0.0, len(names))
        return len(names)

    def fade_in(self, presence: float, num_tokens: int) -> None:
        """Sets the presence of the first tokens in attention, 0 (as if absent) to 1."""
        factor = None if presence >= 1 else torch.full((), presence, device=self.pos_embed.device)
        for block in self.blocks:
            attn: Any = block.attn
            attn.num_fading, attn.presence = num_tokens, factor

    def require_whole(self) -> None:
        """Checks that no block was removed.

        Raises:
            InputError: (a ValueError) some were, by `prune_intermediate_layers`.
        """
        if not self.is_whole:
            raise InputError("a pruned model only gives intermediates: load the whole one to make images or save it")

    def _embed(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        context: Tensor | None,
        interval: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor]]:
        """Returns all tokens, (B, L, D), and the embedded time with interval and guidance, (B, D)."""
        config = self.config
        time = timestep_embedding(timesteps.expand(x.shape[0]), config.embed_dim)  # (B, D)
        time = self.time_embed(time.to(self.pos_embed.dtype))  # (B, D)
        numbers = self._embed_numbers(x, interval, guidance)
        if config.time_conditioning == "adaln":
            time = sum(numbers, time)  # (B, D)
        tokens = [self.patch_embed(x)]  # (B, N, D), where N = H * W / patch_size ** 2
        if context is not None:
            tokens.insert(0, self.context_embed(context))  # (B, num_context_tokens, D)
        if config.time_conditioning == "token":
            tokens.insert(0, time[:, None])  # (B, 1, D)
        if y is not None:
            tokens.insert(0, embed_labels(self.label_emb, y)[:, None])  # (B, 1, D)
        if config.time_conditioning == "token":
            for each in numbers:
                tokens.insert(0, each[:, None])  # (B, 1, D)
        return torch.cat(tokens, dim=1) + self.pos_embed, (time,)  # (B, L, D), where L = extras + N

    def _run_sparse(
        self, h: Tensor, conditions: tuple[Any, ...], outer: int, kept: Tensor | None, dropped: Tensor | None
    ) -> Tensor:
        """Runs the inner blocks on the extra tokens and the kept patches; the gap token stands for all others."""
        num_extra, length = self.config.num_extra_tokens, h.shape[1]
        if kept is None:
            deep = self._run_inner(h, conditions, outer)  # (B, L, D)
        else:
            part = take_tokens(h, kept, num_extra)  # (B, num_extra + M, D)
            part = self._run_inner(part, conditions, outer)
            deep = put_tokens(part, kept, self.gap_token, num_extra, length)  # (B, L, D)
        if dropped is None:
            return deep
        return torch.where(rearrange(dropped, "B -> B 1 1"), self._leave_out(deep), deep)

    def _leave_out(self, h: Tensor, *_: Any) -> Tensor:
        return self.gap_token.to(h.dtype).expand_as(h)

    def _to_image(self, h: Tensor) -> Tensor:
        """Maps the tokens to the prediction, (B, C, H, W)."""
        config = self.config
        h = self.norm(h)[:, config.num_extra_tokens :]  # (B, N, D)
        rows, columns = config.grid_shape
        if config.conv == "tokens":
            h = self.final_layer(rearrange(h, "B (h w) D -> B D h w", h=rows))
            h = rearrange(h, "B D h w -> B (h w) D")
        h = self.decoder_pred(h)  # (B, N, p * p * C)
        p = config.patch_size
        image = rearrange(h, "B (h w) (p1 p2 C) -> B C (h p1) (w p2)", h=rows, w=columns, p1=p, p2=p)  # (B, C, H, W)
        return self.final_layer(image) if config.conv == "image" else image

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        timesteps: Tensor | float | None = None,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> Any:
        """Returns the outputs of chosen blocks, for use as features.

        The arguments are those of timm's ViT, except for its attention masks (`attn_mask`, `is_causal`).

        Blocks are numbered from 0 in the order in which they run: depth / 2 shallow ones, the middle one at depth / 2,
        depth / 2 deep ones. The default conditions are those of a clean image of unknown content: time 0 and the null
        class. Features of a noisy image need its time.

        Args:
            x: (B, C, H, W) images in [-1, 1] or latents, as the model was trained on.
            indices: numbers of blocks, negative ones counted from the end; or how many of the last blocks; None is all.
            return_prefix_tokens: whether each intermediate is a pair, the second the tokens before the patches,
                (B, num_extra_tokens, D): guidance, interval, label, time and context, those that there are.
            norm: whether the final layer norm is applied to intermediates.
            stop_early: whether to skip the blocks after the last chosen one.
            output_fmt: `NCHW` gives (B, D, H / patch_size, W / patch_size), `NLC` gives (B, patches, D).
            intermediates_only: whether to return the intermediates without the final tokens.
            output_dict: whether to return a dict: `image_intermediates`, with `return_prefix_tokens` also
                `image_intermediates_prefix`, and unless `intermediates_only` the tokens as `image_features`.
            timesteps: (B,) times in the network's units, or one time for all; None is 0.
            y: (B,) labels; None is the null class.
            context: (B, num_context_tokens, context_dim); a model that takes one has no default.
            interval: as for `forward`, like the next one.
            guidance: (B, 3).

        Returns:
            The list of intermediates, in the order of `indices`; unless `intermediates_only`, a pair of the normed
            tokens (B, L, D) after the last block that ran, and this list; or a dict, see `output_dict`.

        Raises:
            InputError: (a ValueError) shapes that do not fit the config, missing labels, or blocks that do not exist.
        """
        config = self.config
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        taken = self._take_blocks(indices)

        timesteps = torch.zeros(1, device=x.device) if timesteps is None else timesteps
        if y is None and config.null_label is not None:
            y = torch.full((len(x),), config.null_label, device=x.device)
        timesteps = check_inputs(config, self.weight_dtype, x, timesteps, y, context)
        interval = check_numbers(config, x, interval, guidance)
        h, conditions = self._embed(x, timesteps, y, context, interval, guidance)
        skips: list[Tensor] = []
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number in range(max(taken, default=-1) + 1 if stop_early else len(self.blocks)):
            h = self._run(range(number, number + 1), h, conditions, skips)
            if number in taken:
                prefix, tokens = (self.norm(h) if norm else h).tensor_split([config.num_extra_tokens], dim=1)
                if output_fmt == "NCHW":
                    tokens = rearrange(tokens, "B (h w) D -> B D h w", h=config.grid_shape[0]).contiguous()
                found[number] = prefix, tokens
        prefixes, patches = [found[number][0] for number in taken], [found[number][1] for number in taken]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": patches}
            named |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens else {}
            return named if intermediates_only else {**named, "image_features": self.norm(h)}
        intermediates = list(zip(patches, prefixes)) if return_prefix_tokens else patches
        return intermediates if intermediates_only else (self.norm(h), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the deep blocks after the last chosen one, as timm does for `features_only`.

        The rest is only for `forward_intermediates`, with the returned numbers; it can neither make images nor be
        saved.

        Args:
            indices: as for forward_intermediates.
            prune_norm: whether to remove the final layer norm too.
            prune_head: whether to remove the layers from tokens to the image too.

        Returns:
            The chosen blocks, counted from 0.

        Raises:
            InputError: (a ValueError) blocks that do not exist.
        """
        taken, middle = self._take_blocks(indices), self.config.depth // 2
        self.out_blocks = self.out_blocks[: max([middle, *taken]) - middle]
        self.is_whole = False
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.decoder_pred, self.final_layer = nn.Identity(), nn.Identity()
        return taken

    def _take_blocks(self, indices: int | Sequence[int] | None) -> list[int]:
        """Returns the numbers of the chosen blocks, counted from 0."""
        count = len(self.blocks)
        try:
            chosen: Any = [index(each) for each in indices] if isinstance(indices, Iterable) else indices
            chosen = index(chosen) if chosen is not None and not isinstance(chosen, list) else chosen
        except TypeError:
            raise InputError(f"indices must be whole numbers, got {indices!r:.80}") from None
        if chosen == []:
            return []
        try:
            return feature_take_indices(count, chosen)[0]
        except AssertionError:
            if not isinstance(chosen, list):
                raise InputError(f"indices must be 1 to {count} for the last blocks, got {indices}") from None
            outside = [each for each in chosen if not -count <= each < count]
            raise InputError(f"indices must be {-count} to {count - 1}, got {outside[0]}") from None

    def resize(self: UViTType, img_size: int | tuple[int, int]) -> UViTType:
        """Changes the image size in place, interpolating the position embedding of the patches (bicubic).

        Args:
            img_size: new side in pixels, or (height, width), divisible by the patch size.

        Returns:
            The model itself.

        Raises:
            InputError: (a ValueError) a size that the patch size does not divide.
        """
        old_grid = self.config.grid_shape
        self.config = dataclasses.replace(self.config, img_size=img_size)
        if self.config.grid_shape == old_grid:
            return self
        if self.config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(
                resample_abs_pos_embed(
                    self.pos_embed.detach(), list(self.config.grid_shape), list(old_grid), self.config.num_extra_tokens
                ),
                requires_grad=self.pos_embed.requires_grad,
            )
        else:
            self.reset_buffers()
        if isinstance(self.patch_embed, PatchEmbed):
            self.patch_embed.set_input_size(self.config.image_shape)
        return self
