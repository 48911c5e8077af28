"""Alignment: what is added to the loss so that the features inside a network are good ones sooner.

Features of one call of the network are collected by hooks on its blocks. The gradient of the loss is that of both
parts; its value, which is logged, stays that of the prediction alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, pdist

from uvit.config import Alignment, Config, NetworkConfig
from uvit.networks.contract import Network
from uvit.networks.encoders import Encoders
from uvit.networks.runtime import resolve_precision
from uvit.networks.sparse import take_tokens

MAX_PROJECTOR_WIDTH = 2048
"""Width of REPA's projector; that of a small network is four times the network's."""
MEAN_REMOVED = 0.6
"""Share γ of the mean over an image's patches that iREPA removes from them, as in its code."""
EPSILON = 1e-6


def alignment_by_cosine(tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns minus the mean cosine similarity of tokens with targets, which take no gradient.

    Of two blocks it is LayerSync's loss (arXiv 2510.12581), of projected tokens and an encoder's REPA's (arXiv
    2410.06940, equation 8).

    Args:
        tokens: (B, N, D).
        targets: (B, N, D).
    """
    return -cosine_similarity(tokens.float(), targets.detach().float(), dim=-1).mean()


def dispersion(tokens: Tensor) -> Tensor:
    """Returns the log of the mean of exp(-‖zi - zj‖² / D) over all B² pairs of images (arXiv 2506.09027, InfoNCE-L2).

    z are all of an image's tokens in one vector, and D its length, as in the paper's code, where the mean square takes
    the place of a temperature. Below 0, the farther the images are apart; only those of one call are compared.

    Args:
        tokens: (B, N, D).
    """
    z = rearrange(tokens.float(), "B N D -> B (N D)")
    apart = -pdist(z).square() / z.shape[1]  # (B (B - 1) / 2,), each pair once
    pairs = torch.cat([apart, apart, apart.new_zeros(len(z))])  # (B²,), each with itself too
    return pairs.logsumexp(0) - math.log(len(pairs))


def sharpened(targets: Tensor) -> Tensor:
    """Returns an encoder's patches with less of what all of an image share: (x - γ mean) / std over them (iREPA).

    Args:
        targets: (B, N, D).
    """
    mean, std = targets.mean(dim=1, keepdim=True), targets.std(dim=1, keepdim=True)
    return (targets - MEAN_REMOVED * mean) / (std + EPSILON)


def watched_blocks(kind: Alignment, model: NetworkConfig) -> list[int]:
    """Returns the numbers of the blocks whose output an alignment takes, the first is 0.

    Encoders are aligned at the middle, where networks with long skips have it (U-REPA, arXiv 2503.18414).
    """
    shares = {"layersync": (1 / 3, 2 / 3), "dispersive": (1 / 4,)}.get(kind)
    if shares is None:
        return [model.num_pairs]
    count = 2 * model.num_pairs + 1  # every network has a pair and a middle block, so the numbers differ
    return [max(1, math.floor(share * count + 0.5)) - 1 for share in shares]


def patch_tokens(output: Tensor, model: NetworkConfig) -> Tensor:
    """Returns the patches, (B, N, D), of a block's output: of tokens all but the first ones, of a map its pixels."""
    if output.ndim == 4:
        return rearrange(output, "B D h w -> B (h w) D")
    return output[:, model.num_extra_tokens :]


def build_projector(config: Config, encoders: Encoders, device: torch.device) -> nn.Module | None:
    """Builds the map from the middle block's tokens to the encoder's width; None where there is no encoder.

    REPA's is an MLP of three layers, iREPA's a 3x3 convolution. Its initial weights are drawn from the run's seed, and
    from no generator that anything else draws from.

    Returns:
        (B, N, D) -> (B, N, encoder width), on the device.
    """
    if encoders.patches is None:
        return None
    (width, rows, _), given = config.model.middle_shape, encoders.patches.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        if config.train.alignment == "irepa":
            to_map, to_tokens = Rearrange("B (h w) D -> B D h w", h=rows), Rearrange("B D h w -> B (h w) D")
            return nn.Sequential(to_map, nn.Conv2d(width, given, 3, padding=1), to_tokens).to(device)
        inner = min(MAX_PROJECTOR_WIDTH, 4 * width)
        layers = nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, inner), nn.SiLU(), nn.Linear(inner, given)
        return nn.Sequential(*layers).to(device)


class Aligned(nn.Module):
    """A network and the projector that is trained beside it, one module for DDP, clipping and accumulation.

    Args:
        network: which alone predicts, is averaged and exported.
        projector: as `build_projector` returns it.
    """

    def __init__(self, network: Network, projector: nn.Module | None) -> None:
        super().__init__()
        self.network: Any = network
        self.projector = projector
        self.term: Tensor | None = None  # what the last call added, before its weight

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Predicts as the network does."""
        return self.network(*arguments, **named)


def with_projector(network: Network, projector: nn.Module | None, config: Config) -> nn.Module:
    """Returns the module that is trained: the network itself where nothing is aligned."""
    return Aligned(network, projector) if config.train.alignment_factor else cast(nn.Module, network)


@contextmanager
def outputs_of(blocks: Sequence[nn.Module], numbers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects what some blocks return in calls with a gradient; not when they are recomputed in the backward pass.

    Yields:
        The last output of each block, by number.
    """
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if torch.is_grad_enabled():
                found[number] = output

        return hook

    handles = [blocks[number].register_forward_hook(keep(number)) for number in numbers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def aligned(
    network: Any, config: Config, encoders: Encoders, images: Tensor, kept: Tensor | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Watches a network while its loss is computed.

    Args:
        network: as `with_projector` returns it, prepared or not.
        config: the run.
        encoders: the run's encoders.
        images: (B, C, H, W) clean images as the network sees them, flips included.
        kept: (B, M) numbers of the patches that the inner blocks see; None is all.

    Yields:
        A function from the loss to one of the same value, whose gradient is that of the alignment, too.
    """
    kind, factor = config.train.alignment, config.train.alignment_factor
    if not factor:
        yield lambda loss: loss
        return
    module: Aligned = extract_model_from_parallel(network)
    with outputs_of(module.network.blocks, watched_blocks(kind, config.model)) as found:

        def add(loss: Tensor) -> Tensor:
            tokens = [patch_tokens(output, config.model) for output in found.values()]
            term = _term(tokens, module.projector, config, encoders, images, kept)
            module.term = term.detach()
            return loss + factor * (term - term.detach())

        yield add


def _term(
    tokens: Sequence[Tensor],
    projector: nn.Module | None,
    config: Config,
    encoders: Encoders,
    images: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """Returns what an alignment adds to the loss, before its weight.

    Args:
        tokens: (B, N, D) each, of the watched blocks in their order; of those that see some patches, (B, M, D).
        projector: of the run.
        config: the run.
        encoders: the run's encoders.
        images: (B, C, H, W) clean images in [-1, 1].
        kept: (B, M), as for `aligned`.
    """

    def seen(whole: Tensor) -> Tensor:
        return whole if kept is None or whole.shape[1] == kept.shape[1] else take_tokens(whole, kept, 0)  # (B, M, D)

    kind, first = config.train.alignment, seen(tokens[0])
    if kind == "dispersive":
        return dispersion(first)
    if kind == "layersync" or projector is None:
        return alignment_by_cosine(first, seen(tokens[1]))
    precision = resolve_precision(config.train.mixed_precision, images.device.type, config.model.width)
    half = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.autocast(images.device.type, dtype=half, enabled=precision != "no"):
        targets = seen(encoders.patches(images).float())  # (B, N, D), or (B, M, D)
    return alignment_by_cosine(projector(first.float()), sharpened(targets) if kind == "irepa" else targets)


def last_term(accelerator: Accelerator, model: Any) -> dict[str, float]:
    """Returns what the alignment added to the last part of the batch, before its weight, by its name in the metrics.

    All processes must call it, where it waits for the device; the mean is over all of them.
    """
    term = getattr(extract_model_from_parallel(model), "term", None)
    return {} if term is None else {"alignment": accelerator.gather(term[None]).mean().item()}
