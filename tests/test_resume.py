from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from uvit import Config
from uvit.common.errors import InputError
from uvit.config import CONFIG_FILE, WEIGHTS_FILE, OptimConfig, TrainConfig, to_json
from uvit.training.checkpoint import save_checkpoint
from uvit.training.resume import HARMLESS, changes, check_same_run, last_checkpoint, load_state, open_checkpoint


def test_every_field_that_is_named_harmless_exists():
    for section, fields in HARMLESS.items():
        assert fields <= {field.name for field in dataclasses.fields(getattr(Config(), section))}
    assert set(HARMLESS) == {field.name for field in dataclasses.fields(Config)}


def test_what_changes_the_result_of_training_is_not_harmless():
    told = {
        "process": "schedule prediction loss_space weighting min_snr_gamma time_distribution logit_mean logit_std "
        "objective time_scale instant_share interval_start derivative adaptive_power guidance_max min_divisor",
        "data": "name train_split label_column caption_column crop flip autoencoder text_encoder scale_factor",
        "optim": "name lr betas weight_decay momentum fallback_lr_scale warmup_steps decay grad_clip",
        "train": "batch_size accumulation_steps seed mixed_precision ema_decay average_widths label_dropout init "
        "token_keep token_choice path_drop dense_share "
        "alignment alignment_weight alignment_encoder alignment_encoder_weights",
    }
    for section, names in told.items():
        assert not HARMLESS[section] & set(names.split())
        assert set(names.split()) <= {field.name for field in dataclasses.fields(getattr(Config(), section))}
    assert HARMLESS["model"] == {"attention", "gradient_checkpointing"}


def test_harmless_changes_are_told_from_others():
    before = Config()
    now = Config(optim=OptimConfig(lr=1.0), train=TrainConfig(seed=1, log_every=3))
    assert changes(before, now) == (
        ["optim.lr 0.0002, got 1.0", "train.seed 0, got 1"],
        ["train.log_every 50, got 3"],
    )
    assert changes(before, before) == ([], [])


def test_a_folder_without_a_run_takes_any_config(tmp_path):
    assert check_same_run(Config(), tmp_path, None) == []
    (tmp_path / CONFIG_FILE).write_text(to_json(Config()))
    (tmp_path / "checkpoints").mkdir()
    other = Config(train=TrainConfig(seed=1))
    with pytest.raises(InputError, match=r"holds a run with train.seed 0, got 1: use another --train.run_dir, or"):
        check_same_run(other, tmp_path, tmp_path / CONFIG_FILE)
    anyway = Config(train=TrainConfig(seed=1, resume_anyway=True))
    assert check_same_run(anyway, tmp_path, tmp_path / CONFIG_FILE) == [
        "train.seed 0, got 1",
        "train.resume_anyway False, got True",
    ]


def test_what_a_run_folder_holds_instead_of_a_run(tmp_path):
    latents, weights, network, broken = (tmp_path / name for name in ("latents", "weights", "network", "broken"))
    for folder in (latents, weights, network, broken):
        folder.mkdir()
    (latents / "manifest.json").write_text("{}")
    (weights / WEIGHTS_FILE).touch()
    (network / WEIGHTS_FILE).touch()
    (network / CONFIG_FILE).write_text(to_json(Config().model))
    (broken / "checkpoints").mkdir()
    (broken / CONFIG_FILE).write_text("[]")
    with pytest.raises(InputError, match=r"latents holds latents: use another --train.run_dir"):
        check_same_run(Config(), latents, None)
    for folder in (weights, network):
        with pytest.raises(InputError, match=f"{folder.name} holds weights that are no run's: use another --train.run"):
            check_same_run(Config(), folder, None)
    with pytest.raises(InputError, match=r"Config must be a JSON object, got \[\]"):
        check_same_run(Config(), broken, None)


@pytest.mark.parametrize("sign", ["checkpoints", WEIGHTS_FILE])
def test_a_run_is_one_by_its_config_and_what_it_made(tmp_path, sign):
    other = Config(train=TrainConfig(seed=1))
    (tmp_path / CONFIG_FILE).write_text(to_json(other))
    assert check_same_run(Config(), tmp_path, None) == []  # it was stopped before its first checkpoint
    (tmp_path / sign).mkdir() if sign == "checkpoints" else (tmp_path / sign).touch()
    with pytest.raises(InputError, match=r"holds a run with train.seed 1, got 0"):
        check_same_run(Config(), tmp_path, None)
    (tmp_path / "newest.json").write_text(to_json(Config()))
    assert check_same_run(Config(), tmp_path, tmp_path / "newest.json") == []  # which is what is resumed


def test_a_decay_that_ends_at_another_step_is_told(tmp_path):
    for decay, told in (
        ("constant", []),
        ("cosine", ["so the cosine decay of the learning rate ends at another step"]),
    ):
        before, now = (Config(optim=OptimConfig(decay=decay), train=TrainConfig(num_steps=steps)) for steps in (5, 7))
        (tmp_path / "newest.json").write_text(to_json(before))
        assert check_same_run(now, tmp_path, tmp_path / "newest.json") == ["train.num_steps 5, got 7", *told]
        assert check_same_run(before, tmp_path, tmp_path / "newest.json") == []


def test_a_state_is_loaded_part_by_part_or_refused():
    def parts():
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 3)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    saved, loaded = parts(), parts()
    saved["model"](torch.ones(2)).sum().backward()
    saved["optimizer"].step()
    state = {"step": 7, **{name: part.state_dict() for name, part in saved.items()}}
    assert load_state(state, loaded, Path("run")) == 7
    assert torch.equal(loaded["model"].weight, saved["model"].weight)
    moments = [part["optimizer"].state_dict()["state"][0]["exp_avg"] for part in (saved, loaded)]
    assert torch.equal(*moments) and moments[0].any()
    assert load_state({**state, "step": 0}, loaded, Path("run")) == 0
    for changed, message in (
        ({"step": -1}, "step -1"),
        ({"step": "7"}, "step '7'"),
        ({"step": True}, "step True"),
        ({"model": torch.nn.Linear(3, 3).state_dict()}, "size mismatch for weight"),
        ({"optimizer": 3}, "not subscriptable"),
    ):
        with pytest.raises(InputError, match=f"the checkpoint in run does not fit the config: .*{message}"):
            load_state({**state, **changed}, loaded, Path("run"))
    with pytest.raises(InputError, match="the checkpoint in run does not fit the config: it has no model"):
        load_state({"step": 1}, loaded, Path("run"))


def test_broken_checkpoints_are_set_aside(tmp_path, capsys):
    accelerator = Accelerator(cpu=True)
    assert open_checkpoint(accelerator, tmp_path) is None
    for step in (1, 2):
        save_checkpoint(tmp_path, Config(), step, {}, keep=9)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_00000002/complete.json").unlink()
    assert open_checkpoint(accelerator, tmp_path) == {"step": 1}
    (checkpoints / "broken_step_00000002/old").touch()
    save_checkpoint(tmp_path, Config(), 2, {}, keep=9)  # and again, which replaces what was set aside
    (checkpoints / "step_00000002/complete.json").unlink()
    assert open_checkpoint(accelerator, tmp_path) == {"step": 1}
    assert "step_00000002 is not a complete checkpoint (it has no complete.json): skipped" in capsys.readouterr().err
    assert {path.name for path in checkpoints.iterdir()} == {"step_00000001", "broken_step_00000002"}
    assert not (checkpoints / "broken_step_00000002/old").exists()


def test_the_last_good_checkpoint_is_named():
    assert last_checkpoint(0) == "there is no checkpoint yet"
    assert last_checkpoint(50) == "the last good checkpoint is that of step 50"
