"""How a network runs: precision, compilation, threads. They change the speed, and results only by rounding."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from uvit.common.errors import InputError
from uvit.config import Compile, Precision
from uvit.networks.contract import Network

MIN_BF16_WIDTH = 128
"""Narrower models stay in fp32 on a CPU: casts cost most of the time that products save."""
VARIANTS = 8
"""How often a block may be compiled: for other batch sizes, with and without gradients, in training and sampling."""
# Of glibc's malloc.h: blocks with a mapping of their own, and what may be free at the top before it is returned.
MALLOPT_MMAP_MAX, MALLOPT_TRIM_THRESHOLD = -4, -1


def cpu_has_bf16() -> bool:
    """Returns whether the processor has instructions for bf16 products, rather than emulating them."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: Precision, device_type: str, width: int) -> str:
    """Returns the precision of matrix products: resolves `auto`, and checks an explicit name.

    Args:
        precision: `auto`, `no` (fp32), `bf16` or `fp16`.
        device_type: `cuda`, `cpu`, `mps` ….
        width: of the matrix products, as NetworkConfig.width.

    Raises:
        InputError: an explicit precision that cannot run there.
    """
    if precision == "fp16" and device_type != "cuda":
        raise InputError(f"mixed_precision 'fp16' needs a CUDA device, got {device_type!r}: use 'bf16' or 'no'")
    if precision != "auto":
        return precision
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device_type == "cpu" and width >= MIN_BF16_WIDTH and cpu_has_bf16() else "no"


@contextlib.contextmanager
def tf32(is_allowed: bool = True) -> Iterator[None]:
    """Lets a GPU compute fp32 products in TF32, or keeps it from doing so."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed and before[1]  # convolutions may have it unless the user says no
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def check_compile(how: Compile, device_type: str) -> None:
    """Checks early that a model can be compiled there.

    Raises:
        InputError: CUDA graphs without CUDA, or no compiler.
    """
    if how == "graphs" and device_type != "cuda":
        raise InputError(f"compile 'graphs' needs a CUDA device, got {device_type!r}: use 'blocks' or 'model'")
    if how != "no" and device_type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise InputError(f"compile {how!r} needs a C++ compiler on a CPU, found none: install g++, or use 'no'")


def compile_model(network: Network, how: Compile) -> None:
    """Compiles a network in place, so that its parameters keep their names; the first calls are slow.

    Args:
        network: the network; blocks of the same sizes share their compiled code.
        how: `no`, `blocks` (the fastest to start), `model`, or `graphs` (the model, in CUDA graphs).
    """
    if how == "blocks":
        import torch._dynamo  # takes seconds

        # Blocks of one class share its code, of which Dynamo compiles eight variants and runs the others uncompiled.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * len(network.blocks))
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
        for block in network.blocks:
            block.compile()
    elif how != "no":
        cast(nn.Module, network).compile(mode="reduce-overhead" if how == "graphs" else None)


def set_up_process(num_threads: int, device_type: str = "cpu") -> None:
    """Sets the number of CPU threads; where the CPU computes, the process keeps from now on what memory it has freed.

    A step frees and allocates all its activations. glibc would return them to the system, which clears each page anew.
    Other C libraries have no such option, and one that the user has set stays.

    Args:
        num_threads: of PyTorch; 0 keeps its default.
        device_type: where networks run: `cuda`, `cpu`, `mps` ….
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    is_chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if device_type != "cpu" or sys.platform != "linux" or is_chosen:
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MALLOPT_MMAP_MAX, 0)
        mallopt(MALLOPT_TRIM_THRESHOLD, -1)  # never
