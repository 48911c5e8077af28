"""Trains a network: `accelerate launch train.py configs/digits.py --optim.lr 1e-3`, or just `python train.py …`.

Running the same command again resumes from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env

from uvit.common.cli import check_environment, is_first_process, parse
from uvit.common.errors import InputError, missing_package
from uvit.common.files import lock_folder, make_directory
from uvit.common.messages import tell
from uvit.config import Config, load_config
from uvit.data.batch import ImageData
from uvit.data.latents import check_encoded_by
from uvit.data.loader import check_batch, load_data
from uvit.diffusion.average import check_shares
from uvit.diffusion.samplers import sampling_times
from uvit.networks.attention import resolve_backend
from uvit.networks.encoders import Encoders, load_encoders
from uvit.networks.runtime import check_compile, resolve_precision
from uvit.training.checkpoint import find_config
from uvit.training.resume import check_same_run
from uvit.training.trainer import GRID_ROWS, Trainer
from uvit.weights.timm_network import load_patch_encoder

CAPTIONS_READ = 100  # enough to find a different one for each row of a grid


def read_arguments(arguments: Sequence[str]) -> Config:
    """Parses CONFIG and its overrides, and checks what can be checked before any device starts.

    Raises:
        InputError: no config, an invalid value, or options that cannot run on this machine.
    """
    if not arguments or arguments[0].startswith("-"):
        if "-h" in arguments or "--help" in arguments:
            parse(Config, ["--help"], __doc__, "CONFIG")
        raise InputError("the first argument must be a config file, such as configs/digits.py")
    check_environment()
    config = parse(Config, arguments[1:], __doc__, "CONFIG", load_config(arguments[0]))
    accelerator = None if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.accelerator.current_accelerator()
    device_type = accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
    if config.model.predicted_chans != config.model.in_chans:
        given = f"got {config.model.predicted_chans}"
        raise InputError(f"model.out_chans must be None or in_chans {config.model.in_chans} to train, {given}")
    if config.model.takes_guidance and not config.train.label_dropout:
        raise InputError("model.takes_guidance needs train.label_dropout above 0, got 0")
    config.check_guidance()
    if config.lacks_null:
        raise InputError(f"sample.guidance {config.sample.guidance:g} needs train.label_dropout above 0, got 0")
    resolve_backend(config.model.attention, device_type)
    if config.train.mixed_precision != "auto":  # `auto` needs the device itself, which is not started yet
        resolve_precision(config.train.mixed_precision, device_type, config.model.width)
    check_compile(config.train.compile, device_type)
    if config.train.sample_every:
        sampling_times(config.process, config.sample)
        if config.sample.mixed_precision != "auto":
            resolve_precision(config.sample.mixed_precision, device_type, config.model.width)
    num_processes = int(os.environ.get("WORLD_SIZE") or 1)
    num_together = check_batch(config.train, num_processes) // num_processes
    if config.train.alignment == "dispersive" and num_together == 1:
        raise InputError("train.alignment 'dispersive' needs parts of a batch of 2 images or more, got 1")
    if config.process.objective == "average":
        check_shares(config.process, num_together)
    for engine in ("FSDP", "DEEPSPEED"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            raise InputError(f"a model is sharded by --train.shard True, got {engine}: launch without it")
    if config.train.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise missing_package("train.tracker 'wandb'", "wandb")
    run_dir = config.train.run_dir or str(Path("runs", Path(arguments[0]).stem))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=run_dir))


def first_captions(data: ImageData) -> tuple[str, ...]:
    """Returns the data's first distinct captions, for the rows of a grid."""
    some = data.read(range(min(len(data), CAPTIONS_READ)), np.random.default_rng(0)).captions
    return tuple(dict.fromkeys(texts[0] for texts in some))[:GRID_ROWS]


def main(
    arguments: Sequence[str], make_trainer: Callable[[Config, ImageData, Encoders, Path], Trainer] = Trainer
) -> None:
    """Parses the command line, locks the run folder and trains.

    Args:
        arguments: the command line, without the program's name.
        make_trainer: builds the trainer; for a subclass that changes a part of the loop.
    """
    config = read_arguments(arguments)
    data = load_data(config.data, config.model)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=data.class_names))
    if config.model.context_dim and not config.sample.prompts:
        prompts = first_captions(data)
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompts=prompts))
    run_dir = Path(config.train.run_dir or "")
    changed = check_same_run(config, run_dir, find_config(run_dir))
    encoders = dataclasses.replace(load_encoders(config.data, config.model), patches=load_patch_encoder(config))
    check_encoded_by(data, config.data, encoders)
    is_forward = config.process.objective == "average" and config.process.derivative == "forward"
    if is_forward and config.model.attention != "math" and is_first_process():
        tell("forward derivatives are taken with attention 'math', which has them, and in fp32")
    make_directory(run_dir)
    with lock_folder(run_dir) if is_first_process() else nullcontext():
        make_trainer(config, data, encoders, run_dir).train(changed)
