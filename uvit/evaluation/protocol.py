"""The protocol of an evaluation: how figures were measured, in words that are saved with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from uvit import __version__
from uvit.common.libraries import installed_versions
from uvit.config import Config, checkpoint_dirs
from uvit.diffusion.samplers import resolve_spacing, sampling_times
from uvit.evaluation.features import Features
from uvit.networks.contract import Network
from uvit.networks.encoders import Autoencoder, Encoders, TextEncoder
from uvit.sampling.conditions import Condition
from uvit.sampling.generate import describe_guidance
from uvit.weights.averages import find_average
from uvit.weights.tensors import hash_weights

FIGURES_DEPEND_ON = ("torch", "timm", "torch-fidelity", "diffusers", "transformers")


def describe_drawing(
    checkpoint: str,
    model: Network,
    config: Config,
    encoders: Encoders,
    conditions: Sequence[Condition],
    label_mode: Literal["balanced", "random"],
    seed: int,
    weak: Network | None = None,
    weak_name: str | None = None,
) -> dict[str, str]:
    """Describes how images were drawn.

    Args:
        checkpoint: the run, as the user named it.
        model: its network.
        config: its config, with the sampling settings that were used.
        encoders: its text encoder and autoencoder.
        conditions: of each image.
        label_mode: how they were chosen.
        seed: of the images.
        weak: the network that guidance leads away from; None for the empty condition.
        weak_name: its run or checkpoint, as the user named it.

    Raises:
        InputError: as `find_average`.
    """
    sampling, count = config.sample, f"{len(conditions)} drawn"
    if config.model.num_classes:
        each = f", {len(conditions) // config.model.num_classes} a class"
        count += each if label_mode == "balanced" else ", labels at random"
    elif config.model.context_dim:
        count += f", {len(set(conditions))} different captions of the reference, {label_mode}"
    away_from = None if weak is None else f"{weak_name}, hash {hash_weights(weak.state_dict())}"
    steps, times = checkpoint_dirs(Path(checkpoint)), sampling_times(config.process, sampling)
    weights_hash = hash_weights(model.state_dict())
    average = find_average(Path(checkpoint), weights_hash)
    made = f", {steps[-1].name}" if steps else ""
    if average is not None:
        made = f", width {average.width:g} at step {average.step}"
    spacing = f"{resolve_spacing(config.process, sampling)} from t = {times[0]:g} to {times[-1]:g}"
    return {
        "images": count,
        "weights": f"EMA of {checkpoint}{made}, hash {weights_hash}",
        "guidance": describe_guidance(sampling.guidance, config, away_from).removeprefix("guidance "),
        "guidance_interval": "{:g} to {:g}".format(*sampling.guidance_interval),
        "sampler": f"{sampling.sampler}, {sampling.num_steps} steps ({spacing})",
        "precision": sampling.mixed_precision,
        "reuse": sampling.reuse,
        "seed": str(seed),
        "text_encoder": _describe_encoder(config.data.text_encoder, encoders.text),
        "decoder": _describe_encoder(config.data.autoencoder, encoders.image),
        "rounding": "uint8",
    }


def _describe_encoder(name: str | None, encoder: TextEncoder | Autoencoder | None) -> str:
    return "none" if encoder is None else f"{name}, hash {hash_weights(encoder.network.state_dict())}"


def describe_features(name: str, network: Features) -> str:
    """Describes features: their name and the hash of their weights."""
    return name if network.weights_hash is None else f"{name}, hash {network.weights_hash}"


def versions() -> str:
    """Returns the versions of the packages that figures depend on, as far as they are installed."""
    return ", ".join([f"uvit {__version__}", *installed_versions(FIGURES_DEPEND_ON)])
