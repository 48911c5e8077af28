"""The features that images are compared by: pixels, a judge's, Inception's, or those of a network of timm."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from torch import Tensor, nn

from uvit.common.errors import InputError, missing_package, one_line
from uvit.config import INCEPTION, TIMM
from uvit.data.batch import ImageData
from uvit.data.images import to_unit_range
from uvit.evaluation.judge_network import load_judge
from uvit.weights.tensors import hash_weights, read_pth
from uvit.weights.timm_network import TimmNetwork, existing_file

MAX_PIXEL_FEATURES = 4096
"""With more, their covariance needs more time and memory than a network's features."""
PIXELS, JUDGE = "pixels", "judge"
INCEPTION_FEATURES, INCEPTION_CLASSES = 2048, 1008


class Features(nn.Module):
    """A map from (B, C, H, W) uint8 images to (B, num_features) features and, if it classifies, logits."""

    num_features: int
    num_classes: int = 0

    @property
    def weights_hash(self) -> str | None:
        """Hash of the weights; None where there are none."""
        return hash_weights(self.state_dict()) if any(True for _ in self.parameters()) else None


class PixelFeatures(Features):
    """The pixels themselves, in [-1, 1], for small images.

    Args:
        shape: (C, H, W) of the images.

    Raises:
        InputError: too many pixels.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.num_features = math.prod(shape)
        if self.num_features > MAX_PIXEL_FEATURES:
            given = f"{'x'.join(map(str, shape))} images have {self.num_features}"
            raise InputError(f"features {PIXELS!r} must be {MAX_PIXEL_FEATURES} or fewer, {given}: use {INCEPTION!r}")

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Returns (B, C·H·W) features of (B, C, H, W) uint8 images, and no logits."""
        return to_unit_range(images).flatten(1), None


class JudgeFeatures(Features):
    """The judge of a run's training part: the input of its last layer, and its logits.

    Args:
        train_part: the run's training images, with labels.
        weights: file of a judge's weights; None trains one, or finds it in the cache.

    Raises:
        InputError: no labelled images, or as load_judge.
    """

    def __init__(self, train_part: ImageData | None, weights: str | None) -> None:
        super().__init__()
        self.network = load_judge(
            require_labels(JUDGE, train_part), None if weights is None else existing_file(weights)
        )
        self.num_features, self.num_classes = self.network.head.in_features, self.network.head.out_features

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, num_features) features and (B, num_classes) logits of (B, C, H, W) uint8 images."""
        return self.network(images)


def require_labels(name: str, train_part: ImageData | None) -> ImageData:
    """Returns the training part that features or a classifier learn from.

    Raises:
        InputError: there is none, or it has no labels.
    """
    if train_part is None or not train_part.class_names:
        raise InputError(f"{name!r} needs the labelled images of a run's own data to learn from, got none")
    return train_part


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Stops torch.load from running code in a pickle, which torch-fidelity would allow."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class InceptionFeatures(Features):
    """The FID's Inception v3 in torch-fidelity's port: pooled features and logits.

    Args:
        weights: file of its weights; None downloads them once.

    Raises:
        InputError: torch-fidelity is not installed, or the weights cannot be downloaded or read.
    """

    num_features, num_classes = INCEPTION_FEATURES, INCEPTION_CLASSES

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise missing_package("--features inception", "torch-fidelity") from None
        if weights is not None:
            read_pth(existing_file(weights))
        try:
            with _weights_only():
                self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], weights)
        except Exception as error:  # no network, a broken download, weights of another network
            given = "cannot be downloaded; give a file with --feature_weights" if weights is None else f"in {weights}"
            raise InputError(f"Inception's weights {given}: {one_line(error, 150)}") from None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, 2048) features and (B, 1008) logits of (B, C, H, W) uint8 images."""
        return self.network(images.expand(-1, 3, -1, -1))


class TimmFeatures(TimmNetwork, Features):
    """Any network of timm: pooled features, or a classifier, whose features are its logits.

    Args:
        name: a model of timm, such as vit_small_patch14_dinov2.
        weights: file of its weights (safetensors); None downloads them once.
        classify: whether to return logits instead of features.

    Raises:
        InputError: as TimmNetwork.
    """

    def __init__(self, name: str, weights: str | None, classify: bool = False) -> None:
        super().__init__(name, weights, classify)
        self.num_features = self.network.num_classes if classify else self.network.head_hidden_size

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Returns (B, num_features) features of (B, C, H, W) uint8 images, resized to the network's input (bicubic)."""
        return self.network(self.prepare(images.float() / 255)), None


def build_features(
    name: str, weights: str | None, shape: tuple[int, int, int], train_part: ImageData | None = None
) -> Features:
    """Builds features by name: forward(images) -> (features, logits or None).

    Args:
        name: `pixels`, `judge`, `inception` or `timm:MODEL`.
        weights: file of the network's weights; None trains a judge and downloads the others, once.
        shape: (C, H, W) of the images.
        train_part: the images that a judge learns from.

    Raises:
        InputError: an unknown name, or as the classes above.
    """
    if name == PIXELS:
        return PixelFeatures(shape)
    if name == JUDGE:
        return JudgeFeatures(train_part, weights)
    if name == INCEPTION:
        return InceptionFeatures(weights)
    if name.startswith(TIMM):
        return TimmFeatures(name.removeprefix(TIMM), weights)
    raise InputError(f"features must be {PIXELS!r}, {JUDGE!r}, {INCEPTION!r} or '{TIMM}MODEL', got {name!r}")
