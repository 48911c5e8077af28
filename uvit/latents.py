"""The frozen networks around a backbone: captions to context, and latents to images.

Both come from a folder or the hub, as safetensors only. The packages they need are the extra `latent`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from uvit.config import CONFIG_FILE, DataConfig, UViTConfig
from uvit.errors import InputError
from uvit.hub import find_folder

EMPTY_CAPTION = ""
CACHED_CAPTIONS = 256
DECODED_AT_ONCE = 8
IMAGE_CHANNELS = (1, 3)


@contextlib.contextmanager
def _loading(what: str, library: str) -> Iterator[ModuleType]:
    """Hands out a library and keeps it from drawing bars and reports; what goes wrong is one line."""
    try:
        module = importlib.import_module(library)
        its_logging = importlib.import_module(f"{library}.utils.logging")
    except ImportError:
        raise InputError(f"{what} needs the package {library}, which is not installed: pip install {library}") from None
    verbosity = its_logging.get_verbosity()
    its_logging.set_verbosity_error()
    its_logging.disable_progress_bar()
    of_xformers = logging.getLogger("xformers")  # which diffusers imports, and which tells of kernels that it lacks
    xformers_level = of_xformers.level
    of_xformers.setLevel(logging.ERROR)
    try:
        yield module
    except InputError:
        raise
    except Exception as error:  # the libraries raise a different kind for each way that a folder can be wrong
        raise InputError(f"{what} cannot be loaded: {' '.join(str(error).split()):.200}") from None
    finally:
        of_xformers.setLevel(xformers_level)
        its_logging.enable_progress_bar()
        its_logging.set_verbosity(verbosity)


class TextEncoder(nn.Module):
    """A frozen CLIP text encoder: captions to the last hidden states of all tokens, as the published text models take.

    Args:
        name: folder or hub name of a CLIP, or of its text model alone, with its tokenizer.
        model: the backbone's config, whose context this must give.

    Raises:
        InputError: nothing there, not a CLIP, or a context of another length or width.
    """

    def __init__(self, name: str, model: UViTConfig) -> None:
        super().__init__()
        what = f"text encoder {name!r}"
        folder = find_folder(name, "text encoder", ("*.json", "*.txt", "model.safetensors"))
        if not (folder / CONFIG_FILE).is_file():  # without one, the library takes a CLIP of its own sizes
            raise InputError(f"{what} has no {CONFIG_FILE}")
        with _loading(what, "transformers") as transformers:
            config = transformers.CLIPTextConfig.from_pretrained(folder)
            gives = config.max_position_embeddings, config.hidden_size
            if gives != (model.num_context_tokens, model.context_dim):
                raise InputError(
                    f"{what} gives {gives[0]} tokens of width {gives[1]}, expected model.num_context_tokens "
                    f"{model.num_context_tokens} and model.context_dim {model.context_dim}"
                )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            network, report = transformers.CLIPTextModel.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise InputError(f"{what} is not a CLIP: it has no {min(report['missing_keys'])}")
        self.num_tokens = gives[0]
        self.network: Any = network.eval().requires_grad_(False)
        self._cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions, cut or padded to the model's length.

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
            tokens = self.tokenizer(
                new, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
            )
            # Without the mask of padding, as the published models were trained: the padding is part of the context.
            encoded = self.network(tokens.input_ids.to(self.network.device)).last_hidden_state
            self._cache.update(zip(new, encoded))
        return torch.stack([self._cache[caption] for caption in captions]).to(self.network.device)


class Autoencoder(nn.Module):
    """A frozen AutoencoderKL: latents of the model to images (arXiv 2112.10752).

    Args:
        name: folder or hub name.
        scale_factor: the model's latents are the autoencoder's times this.
        model: the backbone's config, whose channels the latents must have.

    Raises:
        InputError: nothing there, not an AutoencoderKL, or latents of other channels.
    """

    def __init__(self, name: str, scale_factor: float, model: UViTConfig) -> None:
        super().__init__()
        what = f"autoencoder {name!r}"
        folder = find_folder(name, "autoencoder", (CONFIG_FILE, "diffusion_pytorch_model.safetensors"))
        with _loading(what, "diffusers") as diffusers:
            network = diffusers.AutoencoderKL.from_pretrained(folder, use_safetensors=True)
        if network.config.latent_channels != model.in_chans:
            channels = f"latents of {network.config.latent_channels} channels"
            raise InputError(f"{what} has {channels}, expected model.in_chans {model.in_chans}")
        self.scale_factor = scale_factor
        self.network: Any = network.eval().requires_grad_(False)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents, a few at a time: an image needs far more memory than its latents.

        Args:
            latents: (B, C, h, w) as the model draws them.

        Returns:
            (B, 3, H, W) images in about [-1, 1].
        """
        parts = (latents / self.scale_factor).split(DECODED_AT_ONCE)
        return torch.cat([self.network.decode(part).sample for part in parts])


@dataclass(frozen=True)
class Encoders:
    """The frozen networks of a run; None where it has none."""

    text: TextEncoder | None = None
    image: Autoencoder | None = None

    def to(self, device: torch.device) -> Encoders:
        """Moves both to a device."""
        return Encoders(self.text and self.text.to(device), self.image and self.image.to(device))


NO_ENCODERS = Encoders()


def load_encoders(data: DataConfig, model: UViTConfig) -> Encoders:
    """Loads the frozen networks that a run needs, on the CPU.

    Raises:
        InputError: as TextEncoder and Autoencoder, or latents that nothing decodes.
    """
    if data.autoencoder is None and model.in_chans not in IMAGE_CHANNELS:
        raise InputError(f"a model with in_chans {model.in_chans} needs data.autoencoder to make images, got None")
    text = TextEncoder(data.text_encoder, model) if model.context_dim else None
    image = None if data.autoencoder is None else Autoencoder(data.autoencoder, data.scale_factor, model)
    return Encoders(text, image)
