from __future__ import annotations

import pytest
import torch

from uvit import UViTConfig


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors run faster on one thread than on a pool that waits for itself."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> UViTConfig:
    return UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=4, num_heads=4)
