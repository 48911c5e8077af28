"""Distances between sets of images, from features that are accumulated batch by batch.

Memory does not grow with the number of images. Each process accumulates its own part; `reduce` sums over processes.
"""

from __future__ import annotations

import hashlib
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather, reduce
from torch import Tensor

from uvit.common.errors import InputError, one_line

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
MIN_KERNEL_IMAGES = 4
KID_SAMPLES = 10_000
"""Maximum number of features kept for the kernel distance."""
SCORE_SPLITS = 10
ROUNDING = 1e-6
"""Rounding error of statistics that were stored in float32, relative to their trace."""
SHUFFLE_SEED = 2020
"""That of torch-fidelity, so that the splits of the Inception score are the same."""


class Gaussian(NamedTuple):
    """Mean and covariance of the features of a set of images, for the Fréchet distance."""

    mean: Tensor
    """(num_features,) in float64, on the CPU."""
    covariance: Tensor
    """(num_features, num_features) in float64, unbiased, on the CPU."""

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of both."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.covariance.numpy().tobytes()).hexdigest()[:16]


class Moments:
    """Mean and covariance of features, accumulated in float64.

    Args:
        num_features: length of a feature vector.
        device: where to accumulate; one with float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self._count = torch.zeros(1, dtype=torch.float64, device=device)
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> Moments:
        """Adds (B, num_features) features of any dtype; returns itself."""
        features = features.detach().to(self._sum)
        self._count += len(features)
        self._sum += features.sum(dim=0)
        self._outer += features.T @ features
        return self

    def reduce(self) -> Moments:
        """Sums over all processes; returns itself."""
        self._count, self._sum, self._outer = (reduce(part, "sum") for part in (self._count, self._sum, self._outer))
        return self

    @property
    def count(self) -> int:
        """Number of features so far."""
        return int(self._count.item())

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"a distance needs 2 images or more, got {self.count}")
        mean = self._sum / self._count
        covariance = (self._outer - self._count * torch.outer(mean, mean)) / (self._count - 1)
        return Gaussian(mean.cpu(), covariance.cpu())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians, |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) (arXiv 1706.08500).

    The trace of the root is that of the symmetric (Σ_a^½ Σ_b Σ_a^½)^½, whose eigenvalues are real.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(distance.item(), 0.0)


def save_statistics(path: Path, gaussian: Gaussian, **facts: Any) -> None:
    """Writes an .npz with `mu` and `sigma`, the format of pytorch-fid and ADM, and facts of how they were made."""
    np.savez(path, mu=gaussian.mean.numpy(), sigma=gaussian.covariance.numpy(), **facts)


def is_statistics(path: Path) -> bool:
    """Returns whether a file is an .npz of statistics (some of ADM's contain images in addition), or a broken one."""
    if path.suffix != ".npz" or not isfile(path):
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return "mu" in arrays or "arr_0" not in arrays
    except Exception:  # a broken archive may raise any type; load_statistics reports it
        return True


def describe_statistics(path: Path) -> str:
    """Describes the images of a file of statistics; files from other tools do not say how many there are."""
    with np.load(path, allow_pickle=False) as arrays:
        return f"statistics of {arrays['num_images']} images" if "num_images" in arrays else "statistics of others"


def load_statistics(
    path: Path, features: str, num_features: int, image_size: tuple[int, int], weights_hash: str | None = None
) -> Gaussian:
    """Reads `mu` and `sigma`, and checks that they fit; files from other tools lack the facts for some checks.

    Args:
        path: an .npz file.
        features: name of the features to compare with.
        num_features: their length.
        image_size: (height, width) of the images to compare with.
        weights_hash: hash of the weights of the network that computes the features.

    Raises:
        InputError: a file of another kind, or statistics of other features, with both values.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = [arrays[name] for name in ("mu", "sigma")]
            found_features = str(arrays["features"]) if "features" in arrays else features
            found_size = tuple(map(int, arrays["image_size"])) if "image_size" in arrays else image_size
            found_hash = str(arrays["weights_hash"]) if "weights_hash" in arrays else str(weights_hash)
            arrays.get("num_images")  # which describe_statistics reads
    except Exception as error:  # a broken archive may raise any type
        raise InputError(
            f"{path} does not hold statistics (mu, sigma): {type(error).__name__}: {one_line(error, 100)}"
        ) from None
    if any(array.dtype.kind != "f" for array in stored):
        raise InputError(f"{path} must hold mu and sigma of real numbers, got {stored[0].dtype} and {stored[1].dtype}")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in stored)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise InputError(f"{path} must hold mu (D,) and sigma (D, D), got {shapes}")
    if not (mean.isfinite().all() and covariance.isfinite().all() and torch.allclose(covariance, covariance.T)):
        raise InputError(f"{path} must hold finite numbers and a symmetric sigma")
    margin = ROUNDING * covariance.trace().clamp(min=1e-9)
    if torch.linalg.cholesky_ex(covariance + margin * torch.eye(len(covariance))).info:
        raise InputError(f"{path} must hold a positive semidefinite sigma, got one with negative eigenvalues")
    if (len(mean), found_features) != (num_features, features):
        expected = f"expected {num_features} of {features!r}"
        raise InputError(f"{path} holds statistics of {len(mean)} features of {found_features!r}, {expected}")
    if found_hash != str(weights_hash):
        raise InputError(f"{path} holds statistics of {features!r} with weights {found_hash}, expected {weights_hash}")
    if found_size != image_size:
        raise InputError(f"{path} holds statistics of images of size {found_size}, expected {image_size}")
    return Gaussian(mean, covariance)


def shuffled_places(num_images: int) -> Tensor:
    """Returns the place of each image in a random order of all with a fixed seed, (num_images,).

    Images are sampled and split by these places, so that figures do not depend on their order, the batch size or the
    number of processes.
    """
    return torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(num_images)).argsort()


class ImageHash:
    """A hash of a set of images that does not depend on their order: the sum of their hashes."""

    def __init__(self) -> None:
        self._sum = torch.zeros(1, dtype=torch.int64)

    def update(self, images: Tensor) -> ImageHash:
        """Adds (B, C, H, W) uint8 images; returns itself."""
        for image in images.cpu().numpy():
            digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
            self._sum += int.from_bytes(digest, "big", signed=True)  # wraps around at 64 bits
        return self

    def compute(self, device: torch.device) -> str:
        """Sums over all processes; returns 16 hexadecimal digits."""
        return f"{reduce(self._sum.to(device), 'sum').item() % 2**64:016x}"


class FeatureSample:
    """A random sample of features for the kernel distance: those of the images at the first shuffled places.

    Args:
        num_features: length of a feature vector.
        capacity: maximum number of features, over all processes.
    """

    def __init__(self, num_features: int, capacity: int = KID_SAMPLES) -> None:
        self.num_features, self.capacity = num_features, capacity
        self._rows: list[Tensor] = []  # place and features

    def update(self, features: Tensor, places: Tensor) -> FeatureSample:
        """Adds (B, num_features) features of images at these shuffled places; returns itself."""
        rows = torch.cat([places[:, None].float(), features.detach().float().cpu()], dim=1)
        self._rows.append(rows[places < self.capacity])
        return self

    def gather(self, device: torch.device) -> Tensor:
        """Returns the features of all processes, in the order of their places, (N, num_features)."""
        rows = torch.cat([torch.empty(0, 1 + self.num_features), *self._rows])
        counts = gather(torch.tensor([len(rows)], device=device)).tolist()
        padded = torch.zeros(max(*counts, 1), 1 + self.num_features, device=device)
        padded[: len(rows)] = rows.to(device)
        gathered = torch.cat([part[:count] for part, count in zip(gather(padded).split(len(padded)), counts)])
        return gathered[gathered[:, 0].argsort(), 1:].cpu()


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float, int]:
    """Kernel Inception distance (arXiv 1801.01401).

    Args:
        a: (N, num_features).
        b: (M, num_features).

    Returns:
        Mean and standard deviation over 100 random subsets, and the subsets' size: 1000, or half of the images if there
        are fewer than 2000, since subsets that share most images would give too small a deviation.

    Raises:
        InputError: fewer than MIN_KERNEL_IMAGES.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    fewest = min(len(a), len(b))
    if fewest < MIN_KERNEL_IMAGES:
        raise InputError(f"a kernel distance needs {MIN_KERNEL_IMAGES} images or more, got {fewest}")
    size = KID_SUBSET_SIZE if fewest >= 2 * KID_SUBSET_SIZE else fewest // 2
    found = kid_features_to_metric(a, b, kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size


class InceptionScore:
    """exp E[KL(p(y | x) ‖ p(y))] (arXiv 1606.03498), over ten splits.

    Args:
        num_classes: classes of the classifier.
        num_images: images of all processes; each split has a random tenth of them.
        device: where to accumulate; one with float64.
    """

    def __init__(self, num_classes: int, num_images: int, device: torch.device | str = "cpu") -> None:
        self._ends = torch.arange(1, SCORE_SPLITS + 1) * num_images // SCORE_SPLITS  # places after each split's last
        self._counts = torch.zeros(SCORE_SPLITS, 1, dtype=torch.float64, device=device)
        self._sums = torch.zeros(SCORE_SPLITS, num_classes, dtype=torch.float64, device=device)
        self._negentropies = torch.zeros(SCORE_SPLITS, 1, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, places: Tensor) -> InceptionScore:
        """Adds (B, num_classes) logits of images at these shuffled places; returns itself."""
        logits = logits.detach().to(self._sums)
        p = logits.softmax(dim=1)
        splits = torch.bucketize(places, self._ends, right=True).to(p.device)
        self._counts.index_add_(0, splits, torch.ones_like(p[:, :1]))
        self._sums.index_add_(0, splits, p)
        self._negentropies.index_add_(0, splits, (p * logits.log_softmax(dim=1)).sum(dim=1, keepdim=True))
        return self

    def compute(self) -> tuple[float, float]:
        """Sums over all processes; returns mean and standard deviation over the splits."""
        counts, sums, negentropies = (reduce(part, "sum") for part in (self._counts, self._sums, self._negentropies))
        filled = counts[:, 0] > 0
        marginal = (sums / counts)[filled]
        cross = torch.special.xlogy(marginal, marginal).sum(dim=1)
        scores = ((negentropies / counts)[filled, 0] - cross).exp()
        return scores.mean().item(), scores.std(unbiased=False).item()
