"""The judge: a small network that learns to tell a run's classes apart, from its training images alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from timm.layers import ConvNormAct, SelectAdaptivePool2d
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, RandomSampler
from tqdm import tqdm

from uvit.common.errors import InputError
from uvit.config import WEIGHTS_FILE
from uvit.data.batch import Batch, ImageData, read_all
from uvit.data.images import to_unit_range
from uvit.weights.tensors import read_weights, write_weights

WARMUP_SHARE = 0.2


@dataclass(frozen=True)
class Recipe:
    """The judge's network and how it is trained. Another recipe is another judge: its figures are not comparable."""

    layers: tuple[tuple[int, int, int], ...] = ((32, 5, 2), (64, 3, 2), (64, 3, 1), (128, 3, 2))
    """Width, kernel size and stride of each convolution."""
    num_steps: int = 3_000
    batch_size: int = 128
    lr: float = 5e-3
    """AdamW's, at the peak between a linear warm-up and a linear decay to 0."""
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0


class Judge(nn.Module):
    """A convolutional network: layers of convolution, batch norm and ReLU, a mean over positions, a linear classifier.

    Args:
        in_chans: channels of the images.
        num_classes: their classes.
        recipe: the layers.
    """

    def __init__(self, in_chans: int, num_classes: int, recipe: Recipe = Recipe()) -> None:
        super().__init__()
        widths = [in_chans, *(width for width, _, _ in recipe.layers)]
        convolutions = [
            ConvNormAct(width_in, width, kernel_size, stride)
            for width_in, (width, kernel_size, stride) in zip(widths, recipe.layers)
        ]
        self.body = nn.Sequential(*convolutions, SelectAdaptivePool2d(flatten=True))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, num_features) features and (B, num_classes) logits of (B, C, H, W) uint8 images."""
        features = self.body(to_unit_range(images))
        return features, self.head(features)


def train_judge(images: Tensor, labels: Tensor, num_classes: int, recipe: Recipe = Recipe()) -> Judge:
    """Trains a judge on the CPU, so that it is the same whatever the device that images are drawn on.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) below num_classes.
        num_classes: classes of the data.
        recipe: how.

    Returns:
        The judge, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        judge = Judge(images.shape[1], num_classes, recipe)
    optimizer = torch.optim.AdamW(judge.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    warmup, num_steps = WARMUP_SHARE * recipe.num_steps, recipe.num_steps
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup)))
    num_images = num_steps * recipe.batch_size
    order = RandomSampler(range(len(images)), num_samples=num_images, generator=generator)
    with tqdm(total=num_images, unit="image", desc="training the judge", dynamic_ncols=True) as progress:
        for chosen in BatchSampler(order, recipe.batch_size, drop_last=False):
            _, logits = judge(images[chosen])
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=recipe.label_smoothing).backward()
            optimizer.step()
            schedule.step()
            progress.update(len(chosen))
    return judge.eval().requires_grad_(False)


def load_judge(train_part: ImageData, weights: Path | None = None, recipe: Recipe = Recipe()) -> Judge:
    """Returns the judge of a run's training part, which is trained once and kept where torch.hub keeps its weights.

    Args:
        train_part: labelled images.
        weights: file of a judge to use instead.
        recipe: how to train it.

    Raises:
        InputError: weights of another network, or a cache that cannot be written.
    """
    if weights is None:
        with PartialState().main_process_first():  # the others find it in the cache
            weights = _cached(read_all(train_part), len(train_part.class_names), recipe)
    judge = Judge(train_part.shape[0], len(train_part.class_names), recipe)
    try:
        judge.load_state_dict(read_weights(weights))
    except RuntimeError:
        classes = f"{len(train_part.class_names)} classes and {train_part.shape[0]} channels"
        raise InputError(f"{weights} must hold a judge of {classes}, got other tensors") from None
    return judge.eval().requires_grad_(False)


def _cached(data: Batch, num_classes: int, recipe: Recipe) -> Path:
    """Returns the file of a judge's weights in the cache, after training it if it is not there."""
    settings = f"{recipe} {tuple(data.images.shape)} {num_classes}".encode()
    content = hashlib.sha256(settings + data.images.numpy().tobytes() + data.labels.numpy().tobytes())
    folder = Path(torch.hub.get_dir(), "uvit_judges", content.hexdigest()[:16])
    if not (folder / WEIGHTS_FILE).is_file():
        judge = train_judge(data.images, data.labels, num_classes, recipe)
        write_weights(folder, judge.state_dict())
    return folder / WEIGHTS_FILE
