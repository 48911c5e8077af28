"""A run that version 0.1 trained for three steps, resumed by today's code.

tests/data also holds the weights and the metrics that version 0.1 itself had after six steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.images import read_npz
from helpers.runs import lines_of_metrics
from safetensors.torch import load_file

from uvit import UViT
from uvit.commands import sample, train
from uvit.training.checkpoint import load_checkpoint

DATA = Path(__file__).parent / "data"
MAX_DIFFERENCE = 0.2
"""Of a tensor's change in three steps: version 0.1 orthogonalised in bf16, from which fp32 differs by up to 13%."""


@pytest.fixture
def old_run(tmp_path) -> Path:
    """A copy of the run that may be changed."""
    return Path(shutil.copytree(DATA / "run_0_1", tmp_path / "run_0_1"))


def test_training_resumes_as_version_0_1_did(old_run, capsys):
    before = load_checkpoint(old_run)["ema"]
    train.main([str(old_run / "config.json"), "--train.run_dir", str(old_run), "--train.num_steps", "6"])
    assert "resuming from step 3 of 6 in " in capsys.readouterr().out
    assert load_checkpoint(old_run)["step"] == 6
    weights, expected = (
        load_file(path) for path in (old_run / "model.safetensors", DATA / "run_0_1_at_step_6.safetensors")
    )
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        change = torch.linalg.vector_norm(tensor - before[name])
        assert torch.linalg.vector_norm(weights[name] - tensor) < MAX_DIFFERENCE * change, name
    lines = [json.loads(line) for line in (DATA / "run_0_1_at_step_6.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    for line, wanted in zip(lines_of_metrics(old_run), lines, strict=True):
        for name in ("step", "loss", "lr", "grad_norm"):
            # The steps after the first one follow weights that differ a little.
            tolerance = 1e-6 if line["step"] <= 4 else 1e-4
            assert line[name] == pytest.approx(wanted[name], rel=tolerance), (line["step"], name)


def test_the_network_of_an_old_run_predicts(old_run):
    model = UViT.from_pretrained(old_run)
    assert (model.config.num_classes, model.config.null_class, model.config.embed_dim) == (10, True, 16)
    expected = load_checkpoint(old_run)["ema"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 8, 8), torch.tensor(500.0), y=torch.tensor([0, 10])).isfinite().all()


def test_an_old_run_draws_images(old_run, tmp_path):
    output = str(tmp_path / "images.npz")
    sample.main(["--checkpoint", str(old_run), "--num_per_class", "1", "--output", output])
    images, labels = read_npz(output)
    assert images.shape == (10, 8, 8, 1) and labels.tolist() == [*range(10)] and images.std() > 10
