"""The config of a run, as frozen dataclasses: each default is defined once, in its section.

A config file defines one value, `config = Config(...)`; the command line overrides single fields; `config.json` in a
run folder is the same value written out. Each section checks its types and values on construction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from uvit.common.errors import InputError
from uvit.config.process import GUIDANCE_MIDDLE, ProcessConfig, SampleConfig, check_solver
from uvit.config.section import Section
from uvit.config.training import TO_AN_ENCODER, OptimConfig, TrainConfig
from uvit.config.unet import UNetConfig
from uvit.config.uvit import UViTConfig

AnyNetworkConfig = UViTConfig | UNetConfig

# Limits that are checked before memory is allocated; each is far beyond what anyone has read or drawn.
MAX_WORKERS = 1_024
MAX_IMAGES = 10**7


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The images."""

    name: str = "digits"
    """`digits` or `photos` (built in), a folder on disk (of images, one subfolder per class where they have labels; a
    saved data set; or IDX files, as MNIST's), or a hub name."""
    train_split: str = "train"
    """Split to train on; the built-in data sets have their own."""
    test_split: str = "test"
    """Split held out for evaluation."""
    flip: bool = False
    """Mirror every image with probability 1/2."""
    crop: Literal["center", "random"] = "center"
    """How images are cropped to the model's shape: at the centre, or at random, at least 0.8 of their shorter side."""
    on_error: Literal["stop", "skip"] = "stop"
    """When an image cannot be read: stop, or use another one and list it in the run's skipped.txt."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""
    class_names: tuple[str, ...] = ()
    """Names of the labels; read from the data where empty."""
    label_column: str | None = None
    """Column of labels, where a data set has several; a folder's are its classes."""
    caption_column: str | None = None
    """Column of captions for a text model, each a text or a list of texts; None is the only text column, or the one
    named `text`, `caption`, `captions` or `prompt`."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """Frozen CLIP text encoder from captions to the context, for a model that takes one: a folder or a hub name."""
    autoencoder: str | None = None
    """Frozen AutoencoderKL between images and the model's latents: a folder or a hub name, optionally with a folder
    inside it (`user/model/vae`); None is a model of pixels."""
    scale_factor: float = 0.18215
    """Factor from the autoencoder's latents to the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("name", bool(self.name.strip()), "the name of a data set or a folder")
        self._require("scale_factor", self.scale_factor > 0, "above 0")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require_at_most(num_workers=MAX_WORKERS)


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The config of one run."""

    model: AnyNetworkConfig = field(default_factory=UViTConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, count = self.data.class_names, self.model.num_classes
        if names and count and len(names) != count:
            raise InputError(f"data.class_names must have model.num_classes {count} names, got {len(names)}")
        if count and self.model.context_dim:
            raise InputError(
                "a run has labels or captions, got both model.num_classes "
                f"{count} and model.context_dim {self.model.context_dim}"
            )
        if self.sample.reused and self.sample.reused[0] > self.model.reusable_pairs:
            given = f"got {self.sample.reuse}"
            if not self.model.has_skips:
                raise InputError(f"sample.reuse needs a model with long skips, {given} and one without")
            raise InputError(
                f"sample.reuse must have K of at most {self.model.reusable_pairs} pairs of blocks, {given}"
            )
        self._check_average()
        self._check_sparse()
        self._check_alignment()
        if self.train.label_dropout > 0 and not self._has_empty_condition:
            raise InputError(f"train.label_dropout {self.train.label_dropout} needs model.null_class, got False")

    @property
    def _has_empty_condition(self) -> bool:
        """Whether a condition means "none": the null class, or the context of an empty caption."""
        return self.model.null_class or bool(self.model.context_dim)

    def check_guidance(self) -> None:
        """Checks that guidance has something to lead away from: an empty condition, or the outer blocks alone.

        Raises:
            InputError: it has none.
        """
        if self.sample.guidance != 1 and not self._has_empty_condition and not self.sample.guidance_path:
            raise InputError(f"sample.guidance {self.sample.guidance} needs model.null_class, got False")

    @property
    def lacks_null(self) -> bool:
        """Whether guidance would lead away from an empty condition that training has never shown to the network."""
        is_led = self.sample.guidance != 1 and not self.sample.guidance_path
        return is_led and not self.train.label_dropout and self.train.init is None

    def _check_average(self) -> None:
        """Checks that network, objective and solver are of one kind, and that there is one guidance."""
        model, process, sample = self.model, self.process, self.sample
        average = process.objective == "average"
        if model.takes_interval != average:
            raise InputError(
                f"model.takes_interval must be {average} with process.objective {process.objective!r}, "
                f"got {model.takes_interval}"
            )
        check_solver(process, sample.sampler)
        if sample.sampler == "average" and sample.reused:
            raise InputError(f"sample.reuse must be 'none' with sample.sampler 'average', got {sample.reuse!r}")
        if model.takes_guidance:
            if not average:
                raise InputError("model.takes_guidance needs process.objective 'average', got 'instant'")
            if not self._has_empty_condition:
                raise InputError("model.takes_guidance needs model.null_class or a context, got neither")
            if not 1 <= sample.guidance <= process.guidance_max:
                most = f"process.guidance_max {process.guidance_max:g}"
                raise InputError(f"sample.guidance must be 1 to {most}, got {sample.guidance:g}")
            low, high = sample.guidance_interval
            if not low <= GUIDANCE_MIDDLE <= high:
                around = f"around {GUIDANCE_MIDDLE:g} for a network that takes guidance"
                raise InputError(f"sample.guidance_interval must be {around}, got {low:g} to {high:g}")

    def _check_sparse(self) -> None:
        """Checks that blocks which see a part of the patches see some, and that there are such blocks."""
        model, keep = self.model, self.train.token_keep
        if self.sample.guidance_path:
            needs = "sample.guidance_path needs a network trained with model.outer_pairs and train.path_drop above 0"
            if not model.sparse_pairs or not self.train.path_drop:
                raise InputError(f"{needs}, got {model.sparse_pairs} and {self.train.path_drop:g}")
            if model.takes_guidance:
                raise InputError("sample.guidance_path must be False with model.takes_guidance, whose pass is one")
        if keep == 1:
            return
        if not model.sparse_pairs:
            raise InputError(f"train.token_keep {keep:g} needs a U-ViT with model.outer_pairs above 0, got 0")
        rows, columns = model.grid_shape
        if self.train.token_choice == "structured":
            if rows % 2 or columns % 2 or keep * 4 != round(keep * 4):
                needs = "needs a grid of 2x2s and a train.token_keep of 0.25, 0.5 or 0.75"
                raise InputError(f"train.token_choice 'structured' {needs}, got {rows}x{columns} patches and {keep:g}")
        elif round(keep * rows * columns) not in range(1, rows * columns):
            raise InputError(f"train.token_keep must leave some of {rows * columns} patches and not all, got {keep:g}")

    def _check_alignment(self) -> None:
        """Checks that the network has the tokens that an alignment compares, and an encoder the pixels that it sees."""
        kind, autoencoder = self.train.alignment, self.data.autoencoder
        if kind == "layersync" and self.model.num_extra_tokens is None:
            raise InputError(
                f"train.alignment 'layersync' needs blocks that all give tokens of one size, got a {self.model.title}: "
                "use 'dispersive' or 'repa'"
            )
        if kind in TO_AN_ENCODER and autoencoder is not None:
            raise InputError(f"train.alignment {kind!r} needs a model of pixels, got data.autoencoder {autoencoder!r}")
        if kind == "irepa" and self.train.token_keep < 1:
            raise InputError(
                f"train.alignment 'irepa' needs train.token_keep 1, got {self.train.token_keep:g}: use 'repa'"
            )

    def flattened(self) -> dict[str, str]:
        """Returns every value under `section.field`, as trackers take them."""
        sections = dataclasses.asdict(self).items()
        return {f"{section}.{field}": str(value) for section, fields in sections for field, value in fields.items()}
