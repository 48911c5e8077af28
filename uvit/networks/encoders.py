"""The frozen encoders of a run: CLIP from captions to context, and an autoencoder between images and latents.

Both are loaded from a folder or the hub, from safetensors only. They need the packages of the extra `latent`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from uvit.common.errors import InputError, missing_package, one_line
from uvit.common.libraries import quiet
from uvit.config import CONFIG_FILE, MAX_DEPTH, DataConfig, NetworkConfig, read_json

EMPTY_CAPTION = ""
AUTOENCODER_FILE = "diffusion_pytorch_model.safetensors"
CLIP_KINDS = ("clip", "clip_text_model")
CACHED_CAPTIONS = 256
DECODED_AT_ONCE = 8
LOG_VARIANCE_RANGE = (-30.0, 20.0)
IMAGE_CHANNELS = (1, 3)


@contextlib.contextmanager
def loading(what: str, library: Literal["diffusers", "transformers"]) -> Iterator[ModuleType]:
    """Imports and yields a library, without its progress bars and reports; any failure becomes an error in one line."""
    try:
        module = importlib.import_module(library)
    except ImportError:
        raise missing_package(what, library) from None
    try:
        with quiet(library, "xformers"):  # which diffusers imports
            yield module
    except InputError:
        raise
    except Exception as error:  # the libraries raise many types, depending on what is wrong with a folder
        raise InputError(f"{what} cannot be loaded: {one_line(error, 200)}") from None


def _check_depth(what: str, **counts: int) -> None:
    for name, count in counts.items():
        if count > MAX_DEPTH:
            raise InputError(f"{what} must have {name} of at most {MAX_DEPTH:,}, got {count:,}")


def _count_values(path: Path) -> int:
    """Returns the number of values in a safetensors file, from its header."""
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)


def encode_captions(network: Any, tokenizer: Any, captions: Sequence[str], length: int, device: torch.device) -> Tensor:
    """Encodes captions, truncated or padded to a length.

    Args:
        network: a CLIP text model.
        tokenizer: its tokenizer.
        captions: B texts.
        length: tokens of the context.
        device: of the network.

    Returns:
        (B, length, D) last hidden states, on that device.
    """
    tokens = tokenizer(list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    # Without a padding mask, as the published models were trained: the padding is part of the context.
    return network(tokens.input_ids.to(device)).last_hidden_state


def decode_latents(network: Any, latents: Tensor, scale_factor: float) -> Tensor:
    """Decodes latents, a few at a time, since an image needs far more memory than its latents.

    Args:
        network: an AutoencoderKL; its dtype is used.
        latents: (B, C, h, w) as the model generates them.
        scale_factor: factor from the autoencoder's latents to the model's.

    Returns:
        (B, 3, H, W) images in about [-1, 1], in float32.
    """
    parts = (latents / scale_factor).to(network.dtype).split(DECODED_AT_ONCE)
    return torch.cat([network.decode(part).sample.float() for part in parts])


def check_encoder_sizes(model: NetworkConfig, text: Any = None, image: Any = None) -> None:
    """Checks that encoders fit the sizes of a network.

    Args:
        model: the network's config.
        text: a CLIP text model.
        image: an AutoencoderKL.

    Raises:
        InputError: they do not fit, with both sizes.
    """
    if text is not None:
        sizes = text.config.max_position_embeddings, text.config.hidden_size
        if sizes != (model.num_context_tokens, model.context_dim):
            raise InputError(
                f"the text encoder gives {sizes[0]} tokens of width {sizes[1]}, expected model.num_context_tokens "
                f"{model.num_context_tokens} and model.context_dim {model.context_dim}"
            )
    if image is not None and image.config.latent_channels != model.in_chans:
        channels = f"latents of {image.config.latent_channels} channels"
        raise InputError(f"the autoencoder has {channels}, expected model.in_chans {model.in_chans}")


class TextEncoder(nn.Module):
    """A frozen CLIP text encoder: captions to the last hidden states of all tokens, as for the published text models.

    Args:
        name: folder or hub name of a CLIP, or only its text model, with its tokenizer.

    Raises:
        InputError: nothing there, or not a CLIP.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        what = f"text encoder {name!r}"
        from uvit.common.hub import find_folder

        folder = find_folder(name, "text encoder", ("*.json", "*.txt", "model.safetensors"))
        config_file = folder / CONFIG_FILE
        if not isfile(config_file):  # without one, the library assumes a CLIP of its default sizes
            raise InputError(f"{what} has no {CONFIG_FILE}")
        raw = read_json(config_file)
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind not in CLIP_KINDS:
            raise InputError(f"{what} must be a CLIP, got model_type {kind!r}")
        with loading(what, "transformers") as transformers:
            config = transformers.CLIPTextConfig.from_pretrained(folder)
            self.context_shape = (config.max_position_embeddings, config.hidden_size)
            _check_depth(what, num_hidden_layers=config.num_hidden_layers)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            last = max(self.tokenizer.get_vocab().values())
            if last >= config.vocab_size:
                raise InputError(f"{what} has a vocabulary of {config.vocab_size}, got a tokenizer with token {last}")
            network, report = transformers.CLIPTextModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise InputError(f"{what} is not a CLIP: it has no {min(report['missing_keys'])}")
        self.network: Any = network.eval().requires_grad_(False)
        self._cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions, truncated or padded to the model's length.

        Args:
            captions: B texts.

        Returns:
            (B, num_context_tokens, context_dim) in float32, on the device of the encoder.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._cache]
        if len(self._cache) + len(new) > CACHED_CAPTIONS:
            self._cache.clear()
            new = list(dict.fromkeys(captions))
        if new:
            encoded = encode_captions(self.network, self.tokenizer, new, self.context_shape[0], self.network.device)
            self._cache.update(zip(new, encoded))
        return torch.stack([self._cache[caption] for caption in captions]).to(self.network.device)


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL: images to latents and back (arXiv 2112.10752).

    Args:
        name: folder or hub name.
        scale_factor: factor from its latents to those of the model.

    Raises:
        InputError: nothing there, or not an AutoencoderKL.
    """

    def __init__(self, name: str, scale_factor: float) -> None:
        super().__init__()
        what = f"autoencoder {name!r}"
        from uvit.common.hub import find_folder

        folder = find_folder(name, "autoencoder", (CONFIG_FILE, AUTOENCODER_FILE))
        with loading(what, "diffusers") as diffusers:
            config = read_json(folder / CONFIG_FILE)
            _check_depth(what, layers_per_block=config["layers_per_block"], blocks=len(config["block_out_channels"]))
            with torch.device("meta"):  # so that a config with wrong sizes is found before memory is allocated
                network = diffusers.AutoencoderKL.from_config(config)
            expected = sum(parameter.numel() for parameter in network.parameters())
            found = _count_values(folder / AUTOENCODER_FILE)
            if expected > found:
                raise InputError(f"{what} has weights of {found:,} values, expected {expected:,} by its {CONFIG_FILE}")
            network, report = diffusers.AutoencoderKL.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise InputError(f"{what} is not an AutoencoderKL: it has no {min(report['missing_keys'])}")
        self.scale_factor = scale_factor
        self.latent_channels: int = network.config.latent_channels
        self.factor = 2 ** (
            len(network.config.block_out_channels) - 1
        )  # side of an image, as a multiple of its latents'
        self.network: Any = network.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images.

        Args:
            images: (B, 3, H, W) in [-1, 1].

        Returns:
            (B, 2C, h, w) moments of the latents, mean and log-variance, unscaled.
        """
        return self.network.encode(images).latent_dist.parameters

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents, as decode_latents does."""
        return decode_latents(self.network, latents, self.scale_factor)

    def encoder_state_dict(self) -> dict[str, Tensor]:
        """Returns the weights of the encoder only, which autoencoders with different decoders may share."""
        return {
            name: tensor
            for name, tensor in self.network.state_dict().items()
            if "decode" not in name and "post_quant" not in name
        }


def sample_latents(moments: Tensor, scale_factor: float, generator: torch.Generator) -> Tensor:
    """Draws latents from their moments (arXiv 2112.10752).

    Args:
        moments: (B, 2C, h, w) mean and log-variance, which is clamped to [-30, 20].
        scale_factor: factor that the latents are multiplied by.
        generator: on the device of the moments.

    Returns:
        (B, C, h, w) in float32.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    deviation = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
    noise = torch.randn(mean.shape, device=mean.device, generator=generator)
    return scale_factor * (mean + deviation * noise)


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders of a run; None where it has none."""

    text: TextEncoder | None = None
    image: Autoencoder | None = None
    patches: Any = None
    """Only in training, and where tokens are aligned to an encoder: `uvit.weights.timm_network.PatchEncoder`."""

    def to(self, device: torch.device) -> Encoders:
        """Moves all to a device."""
        text, image, patches = self.text, self.image, self.patches
        return Encoders(text and text.to(device), image and image.to(device), patches and patches.to(device))


NO_ENCODERS = Encoders()


def load_encoders(data: DataConfig, model: NetworkConfig) -> Encoders:
    """Loads the frozen encoders that a run needs, on the CPU.

    Raises:
        InputError: as TextEncoder and Autoencoder; encoders that do not fit the model; latents without an autoencoder.
    """
    if data.autoencoder is None and model.in_chans not in IMAGE_CHANNELS:
        raise InputError(f"a model with in_chans {model.in_chans} needs data.autoencoder to make images, got None")
    text = TextEncoder(data.text_encoder) if model.context_dim else None
    image = None if data.autoencoder is None else Autoencoder(data.autoencoder, data.scale_factor)
    check_encoder_sizes(model, text and text.network, image and image.network)
    return Encoders(text, image)
