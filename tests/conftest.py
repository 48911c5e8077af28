from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.encoders import make_text_encoder
from helpers.hub_server import WRITER, serve_hub
from helpers.measured_run import make_measured_run
from helpers.runs import TEXT, TINY
from safetensors.torch import save_file

from uvit import UViTConfig
from uvit.commands import train


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors run faster on one thread than on a pool that waits for itself."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _own_command_line(monkeypatch):
    """A command line that `python -m uvit COMMAND` may replace, and the signal handler that commands replace."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with tiny.py and a finished run of it, runs/tiny."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["tiny.py"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="session")
def trained_on_text(trained) -> Path:
    """The same folder, with a finished run of a text model, runs/text, and its encoder, clip."""
    make_text_encoder(trained / "clip", num_tokens=24, width=8)
    arguments = ["--train.run_dir", "runs/text", "--data.text_encoder", "clip", "--train.tracker", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        train.main(["tiny.py", *TEXT, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    return trained


@pytest.fixture
def workdir(trained, monkeypatch) -> Path:
    """The folder of `trained`, as the current one."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A folder with a copy of one run, tiny."""
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "runs" / "tiny")
    return tmp_path / "runs"


@pytest.fixture
def offline(monkeypatch) -> None:
    """No way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub on localhost, with nobody logged in."""
    with serve_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture
def logged_in(monkeypatch):
    """A token that may write to the hub."""
    monkeypatch.setenv("HF_TOKEN", WRITER)


@pytest.fixture
def measured_run(tmp_path) -> Path:
    """A run with figures and grids, in a folder of this machine."""
    return make_measured_run(tmp_path)
