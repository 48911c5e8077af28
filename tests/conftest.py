from __future__ import annotations

import sys

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from uvit import UViTConfig


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors run faster on one thread than on a pool that waits for itself."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny() -> UViTConfig:
    return UViTConfig(img_size=8, patch_size=2, in_chans=1, embed_dim=32, depth=4, num_heads=4)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights for the FID's network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[FeatureExtractorInceptionV3.__module__]
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(torch.nn.Module.state_dict(network), path)
    return path


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    """A file of random weights for a small network of timm."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path
