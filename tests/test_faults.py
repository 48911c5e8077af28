"""Runs that are killed, stopped, starved of disk or fed with wrong numbers, against one that nothing happened to."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.commands import run_python
from helpers.faults import (
    acting_loss,
    die,
    die_leaving,
    no_room,
    no_room_for_the_rest,
    on_event,
    read_only,
    spoiled_loss,
    steep_loss,
)
from helpers.forks import start_training, train_forked, train_in_two_forks, wait_for
from helpers.runs import ROOT, TINY
from helpers.same_runs import assert_same, assert_same_run, metrics_of

from uvit.common.errors import InputError
from uvit.config import METRICS_FILE, WEIGHTS_FILE, checkpoint_dirs, load_config
from uvit.data.batch import Batch
from uvit.data.loader import StepSampler
from uvit.training.checkpoint import MARKER_FILE, STATE_FILE, load_checkpoint, save_checkpoint
from uvit.training.trainer import Trainer
from uvit.weights.tensors import read_weights

# With workers, flips and parts of a batch, in the middle of a fourth epoch, checkpoints and log lines out of step.
OPTIONS = (
    "--data.num_workers 1 --data.flip True --train.accumulation_steps 2 --train.batch_size 600 --train.num_steps 7 "
    "--train.save_every 2 --train.log_every 3 --train.sample_every 5 --train.tracker none"
).split()
PARTS = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a config, tiny.py, and of a run of it that nothing happened to, whole."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tiny.py").write_text(TINY)
    assert train_forked(arguments_of(folder, folder / "whole"), folder / "whole.log")[0] == 0
    return folder


def arguments_of(folder, run_dir, *more):
    return [folder / "tiny.py", "--train.run_dir", run_dir, *OPTIONS, *more]


def in_step(step, act, loss_of=None):
    """What makes a run act in the middle of a step."""
    return {"loss_of": acting_loss(step, act, PARTS, **({"loss_of": loss_of} if loss_of else {}))}


def at_event(event, matches, act=die, count=1):
    """What makes a run act right before a file operation."""
    return {"prepare": lambda: on_event(event, matches, act, count)}


def in_a_line_of_metrics():
    """What kills a run that has written half of its first line."""
    armed = []
    how = at_event("write", lambda path: bool(armed) and path.name == METRICS_FILE, die_leaving('{"step": 3, "lo'))
    return how | in_step(3, lambda: armed.append(True))


def saved_steps(run_dir):
    """Steps of the checkpoints that have their names."""
    return [int(folder.name[-8:]) for folder in checkpoint_dirs(run_dir)]


def half_written(run_dir):
    """The one checkpoint that has no name yet."""
    (folder,) = (run_dir / "checkpoints").glob(".step_*")
    return folder


def holds_weights_without_their_checkpoint(run_dir):
    weights, state = read_weights(run_dir / WEIGHTS_FILE), load_checkpoint(run_dir)
    return state["step"] == 4 and not torch.equal(weights["pos_embed"], state["ema"]["pos_embed"])


# For each moment, what brings it about, and what shows afterwards that it was this one.
MOMENTS = {
    "in the first step": (in_step(1, die), lambda run: (run / "config.json").is_file() and not saved_steps(run)),
    "between checkpoints": (
        in_step(4, die),
        lambda run: saved_steps(run) == [2] and metrics_of(run)[-1]["step"] == 3,
    ),
    "in a state file": (
        at_event("write", lambda path: path.name == STATE_FILE, die_leaving("half"), count=2),
        lambda run: saved_steps(run) == [2] and (half_written(run) / STATE_FILE).read_bytes() == b"half",
    ),
    "before the marker": (
        at_event("write", lambda path: path.name == MARKER_FILE, count=2),
        lambda run: (half_written(run) / STATE_FILE).is_file() and not (half_written(run) / MARKER_FILE).exists(),
    ),
    "before the checkpoint gets its name": (
        at_event("os.rename", lambda path: path.name == "step_00000004"),
        lambda run: saved_steps(run) == [2] and (half_written(run) / MARKER_FILE).is_file(),
    ),
    "before old checkpoints go": (
        at_event("shutil.rmtree", lambda path: path.name == "step_00000002" and path.exists()),
        lambda run: saved_steps(run) == [2, 4, 6],
    ),
    "in a line of metrics": (
        in_a_line_of_metrics(),
        lambda run: (run / METRICS_FILE).read_text() == '{"step": 3, "lo',
    ),
    "between weights and checkpoint": (
        at_event("os.mkdir", lambda path: path.name.startswith(".step_00000006")),
        holds_weights_without_their_checkpoint,
    ),
    "between the last grid and the last checkpoint": (
        at_event("write", lambda path: path.name.startswith(".model-"), count=4),
        lambda run: (run / "samples/step_00000007.png").is_file() and saved_steps(run) == [4, 6],
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_like_an_uninterrupted_one(moment, whole, tmp_path):
    arguments, (how, was_hit) = arguments_of(whole, tmp_path / "run"), MOMENTS[moment]
    status, lines = train_forked(arguments, tmp_path / "log", **how)
    assert status == -signal.SIGKILL, lines
    assert was_hit(tmp_path / "run")
    status, _ = train_forked(arguments, tmp_path / "log")
    assert status == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_the_run_of_these_tests_crosses_epochs():
    *_, last = (draw for _, draw in zip(range(14), StepSampler(1437, 300, 0)))
    assert 14 * 300 / 1437 > 2 and len(last.indices) == 300


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(signum, status, whole, tmp_path):
    """The signal goes to the workers too, as a terminal and a cluster send it."""

    arguments = arguments_of(whole, tmp_path / "run")
    how = in_step(3, lambda: os.killpg(0, signum))
    found, lines = train_forked(arguments, tmp_path / "log", lambda: os.setpgid(0, 0), **how)
    assert found == status
    assert lines == [f"stopped by {signal.Signals(signum).name} at step 3 of 7 in {tmp_path / 'run'}, saved"]
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert train_forked(arguments, tmp_path / "log")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_second_ctrl_c_ends_a_run_at_once(whole, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    status, lines = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log", **in_step(3, twice))
    assert status == 130 and lines == ["stopped by Ctrl-C"]
    assert load_checkpoint(tmp_path / "run")["step"] == 2


class FailingData:
    """Data whose n-th batch, counted from the start of its process, cannot be read."""

    def __init__(self, data, number, error):
        self.data, self.number, self.error, self.count = data, number, error, 0
        self.shape, self.class_names = data.shape, data.class_names

    def __len__(self):
        return len(self.data)

    def read(self, indices, rng) -> Batch:
        self.count += 1
        if self.count == self.number:
            raise self.error("no such image")
        return self.data.read(indices, rng)


@pytest.mark.parametrize(("error", "status"), [(InputError, 2), (ZeroDivisionError, 1)])
def test_an_exception_in_a_worker_ends_the_run_and_its_workers(error, status, whole, tmp_path):
    def make_trainer(config, data, *rest, **named):
        return Trainer(config, FailingData(data, 7, error), *rest, **named)  # the first part of step 4

    arguments = arguments_of(whole, tmp_path / "run")
    found, lines = train_forked(arguments, tmp_path / "log", make_trainer=make_trainer)
    assert found == status and "no such image" in lines[-1]
    assert len(lines) == 1 or error is not InputError
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert train_forked(arguments, tmp_path / "log")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def lose_marker(folder):
    (folder / "complete.json").unlink()


def cut(folder):
    os.truncate(folder / "training_state.pt", 1000)


def flip_a_bit(folder):
    content = bytearray((folder / "training_state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "training_state.pt").write_bytes(content)


def lose_state(folder):
    (folder / "training_state.pt").unlink()


@pytest.mark.parametrize("damage", [lose_marker, cut, flip_a_bit, lose_state])
def test_a_broken_checkpoint_is_reported_and_skipped(damage, whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step_00000007")
    status, lines = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "step_00000007 is not a complete checkpoint (" in warning and warning.endswith("): skipped")
    assert any(line.startswith("resuming from step 6 of 7") for line in lines)
    shutil.rmtree(tmp_path / "run/checkpoints/broken_step_00000007")
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_run_with_only_broken_checkpoints_does_not_start_again(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    for folder in checkpoint_dirs(tmp_path / "run"):
        cut(folder)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, (line,) = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 2 and line.startswith("error: ")
    assert "step_00000007 is not a complete checkpoint" in line and "remove it to start over" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def full_disk_at_save(number):
    """What makes a save, numbered from 1, fail half-way."""
    return at_event("write", lambda path: path.name == STATE_FILE, no_room_for_the_rest, number)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole, tmp_path):
    status, lines = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log", **full_disk_at_save(2))
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "step 4 could not be saved (cannot write " in warning and "No space left on device" in warning
    assert "the last good checkpoint is that of step 2" in warning
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_disk_that_is_full_at_the_end_is_an_error(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    status, lines = train_forked(arguments, tmp_path / "log", **full_disk_at_save(4))
    assert status == 1
    assert lines[-1].startswith("error: step 7 could not be saved") and "that of step 6" in lines[-1]
    assert train_forked(arguments, tmp_path / "log")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_metrics_that_cannot_be_written_are_written_later_and_grids_are_left_out(whole, tmp_path):
    armed = []

    def prepare():
        on_event("write", lambda path: bool(armed) and path.name == METRICS_FILE, no_room)
        on_event("write", lambda path: path.parent.name == "samples", read_only, count=None)

    how = in_step(3, lambda: armed.append(True))
    status, lines = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log", prepare, **how)
    assert status == 0
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 3 and "metrics.jsonl, training continues: [Errno 28] No space left" in warnings[0]
    assert all(".png, training continues: " in line and "Read-only file system" in line for line in warnings[1:])
    assert metrics_of(tmp_path / "run") == metrics_of(whole / "whole")


def test_a_deleted_run_folder_is_created_again(whole, tmp_path):
    how = in_step(5, lambda: shutil.rmtree(tmp_path / "run"))
    status, lines = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log", **how)
    assert status == 0
    assert any(line.startswith("warning: ") and "config.json is gone" in line for line in lines)
    assert_same(load_checkpoint(tmp_path / "run"), load_checkpoint(whole / "whole"))
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["num_steps"] == 7


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_reported(factor, whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--train.save_every", "1", "--train.keep", "9")
    status, lines = train_forked(arguments, tmp_path / "log", loss_of=spoiled_loss({8}, factor))  # a part of step 4
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith(f"warning: step 4 is skipped: loss {factor}, gradient norm nan")
    third, fourth, fifth = (load(tmp_path / "run", step) for step in (3, 4, 5))
    for part in ("model", "ema", "optimizer"):
        if part == "optimizer":
            assert_same(third[part]["state"], fourth[part]["state"])
        else:
            assert_same(third[part], fourth[part])
    assert not torch.equal(fourth["model"]["pos_embed"], fifth["model"]["pos_embed"])
    skipped, last = (line for line in metrics_of(tmp_path / "run") if line["step"] in (4, 6))
    assert skipped == {"step": 4, "skipped": True, "loss": str(factor), "grad_norm": "nan"}
    assert math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])


def load(run_dir, step):
    return torch.load(run_dir / f"checkpoints/step_{step:08d}/training_state.pt", weights_only=True)


def test_a_gradient_that_is_not_finite_is_enough_to_leave_a_step_out(whole, tmp_path):
    status, _ = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log", loss_of=steep_loss(8))
    assert status == 0
    assert metrics_of(tmp_path / "run")[1]["skipped"] and math.isfinite(metrics_of(tmp_path / "run")[1]["loss"])


def test_too_many_bad_steps_in_a_row_stop_the_run_also_across_a_kill(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--train.max_bad_steps", "3")
    message = (
        "error: 3 steps in a row had a loss or gradient that is not finite, the last step 6; "
        "the last good checkpoint is that of step 2"
    )

    from_step_4 = range(7, 99)
    how = in_step(6, die, spoiled_loss(from_step_4))
    assert train_forked(arguments, tmp_path / "log", **how)[0] == -signal.SIGKILL
    status, lines = train_forked(arguments, tmp_path / "log", loss_of=spoiled_loss(range(99)))
    assert (status, lines[-1]) == (1, message)
    alone = arguments_of(whole, tmp_path / "alone", "--train.max_bad_steps", "3")
    status, lines = train_forked(alone, tmp_path / "log", loss_of=spoiled_loss(from_step_4))
    assert (status, lines[-1]) == (1, message)
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "alone")
    assert train_forked(arguments, tmp_path / "log")[0] == 0  # what was wrong is put right


def test_checkpoints_from_before_bad_steps_are_kept(whole, tmp_path):
    every = ["--train.save_every", "1", "--train.keep", "1"]
    arguments = arguments_of(whole, tmp_path / "run", *every)
    status, lines = train_forked(arguments, tmp_path / "log", loss_of=spoiled_loss(range(7, 99)))
    message = "error: 4 steps in a row had a loss or gradient that is not finite, the last step 7; "
    assert (status, lines[-1]) == (1, f"{message}the last good checkpoint is that of step 3")
    assert [path.name[-1] for path in checkpoint_dirs(tmp_path / "run")] == ["3", "4", "5", "6", "7"]
    for folder in checkpoint_dirs(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    assert train_forked(arguments, tmp_path / "log")[0] == 0
    assert [path.name[-1] for path in checkpoint_dirs(tmp_path / "run")] == ["7"]


def test_a_run_without_config_json_is_recognised_by_its_checkpoint(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    status, (line,) = train_forked(arguments_of(whole, tmp_path / "run", "--optim.lr", "0.5"), tmp_path / "log")
    assert status == 2 and "holds a run with optim.lr 0.01, got 0.5" in line


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("step", 2.5, "step 2.5"),
        ("step", -5, "step -5"),
        ("progress", {"bad_steps": "x"}, "bad_steps 'x'"),
        ("optimizer", {}, "state of 1 parameters, expected"),
    ],
)
def test_a_checkpoint_with_invalid_values_is_refused(part, value, message, whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    state = load_checkpoint(tmp_path / "run")
    state["step"] -= 1  # so that there is something to do
    if part == "optimizer":
        state["optimizer"]["state"] = {0: state["optimizer"]["state"][0]}
    else:
        state[part] = state[part] | value if isinstance(value, dict) else value
    save_checkpoint(tmp_path / "run", load_config(tmp_path / "run/config.json"), 7, state, keep=1)
    status, (line,) = train_forked(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 2 and "does not fit the config: " in line and message in line


def test_all_changes_that_make_another_run_are_named_and_can_be_allowed(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    other = "--optim.lr 0.5 --train.seed 3 --train.log_every 1 --train.num_steps 8".split()
    status, (line,) = train_forked(arguments_of(whole, tmp_path / "run", *other), tmp_path / "log")
    assert status == 2
    assert "holds a run with optim.lr 0.01, got 0.5; train.seed 0, got 3: use another --train.run_dir, or" in line
    more = [*other, "--train.resume_anyway", "True"]
    status, lines = train_forked(arguments_of(whole, tmp_path / "run", *more), tmp_path / "log")
    assert status == 0
    (line,) = [line for line in lines if line.startswith("resuming from step 7 of 8")]
    assert "optim.lr 0.01, got 0.5; train.seed 0, got 3;" in line and "train.log_every 3, got 1" in line
    assert metrics_of(tmp_path / "run")[-1]["lr"] == 0.5
    wrong = [*more, "--train.num_steps", "9", "--optim.name", "adamw"]
    status, lines = train_forked(arguments_of(whole, tmp_path / "run", *wrong), tmp_path / "log")
    assert status == 2 and lines[-1].endswith("does not fit the config: its optimizer is a different one")


def test_a_longer_decay_is_reported(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--optim.decay", "cosine")
    assert train_forked([*arguments, "--train.num_steps", "2"], tmp_path / "log")[0] == 0
    status, lines = train_forked(arguments, tmp_path / "log")
    assert status == 0
    assert any("train.num_steps 2, got 7; so the cosine decay" in line for line in lines)


def test_a_second_run_in_a_folder_is_refused_until_the_first_ends_or_is_killed(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    reading, writing = os.pipe()

    def wait():
        os.write(writing, b"x")
        signal.pause()

    pid = start_training(arguments, tmp_path / "first", **in_step(3, wait))
    os.read(reading, 1)
    status, (line,) = train_forked(arguments, tmp_path / "second")
    assert status == 2
    assert line.startswith(f"error: {tmp_path / 'run'} is in use by process {pid} on ")
    os.kill(pid, signal.SIGKILL)  # its worker lives on for some seconds
    wait_for(pid)
    assert train_forked(arguments, tmp_path / "second")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


@pytest.fixture(scope="module")
def shared(whole) -> Path:
    """A run of two processes that nothing happened to."""
    assert train_in_two_forks(arguments_of(whole, whole / "shared"), whole) == [0, 0]
    return whole / "shared"


@pytest.mark.slow
def test_two_processes_that_are_killed_resume_like_uninterrupted_ones(shared, whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    for step in (3, 4):
        statuses = train_in_two_forks(arguments, tmp_path, lambda rank, step=step: in_step(step, die))
        assert statuses == [-signal.SIGKILL] * 2
    assert train_in_two_forks(arguments, tmp_path) == [0, 0]
    assert_same_run(tmp_path / "run", shared)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("reached", [0, 1])
def test_a_signal_to_one_process_ends_both_at_the_same_step(signum, status, reached, shared, whole, tmp_path):
    def how(rank):
        return in_step(3, lambda: os.kill(os.getpid(), signum)) if rank == reached else {}

    arguments = arguments_of(whole, tmp_path / "run")
    assert train_in_two_forks(arguments, tmp_path, how) == [status] * 2
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert "Traceback" not in (tmp_path / "rank_0.log").read_text() + (tmp_path / "rank_1.log").read_text()
    assert train_in_two_forks(arguments, tmp_path) == [0, 0]
    assert_same_run(tmp_path / "run", shared)


@pytest.mark.slow
def test_a_bad_loss_in_one_process_is_left_out_by_both(shared, whole, tmp_path):
    def how(rank):
        return {"loss_of": spoiled_loss({7})} if rank == 1 else {}

    arguments = arguments_of(whole, tmp_path / "run", "--train.save_every", "1", "--train.keep", "9")
    assert train_in_two_forks(arguments, tmp_path, how) == [0, 0]
    assert metrics_of(tmp_path / "run")[1] == {"step": 4, "skipped": True, "loss": "nan", "grad_norm": "nan"}
    assert_same(load(tmp_path / "run", 3)["model"], load(tmp_path / "run", 4)["model"])


@pytest.mark.slow
def test_another_number_of_processes_is_reported(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    assert train_in_two_forks(arguments_of(whole, tmp_path / "run", "--train.num_steps", "8"), tmp_path) == [0, 0]
    assert "train.num_steps 7, got 8; num_processes 1, got 2" in (tmp_path / "rank_0.log").read_text()
    assert load_checkpoint(tmp_path / "run")["progress"]["num_processes"] == 2


@pytest.mark.slow
def test_fifty_kills_lose_no_more_than_the_steps_since_a_checkpoint(tmp_path):
    """The script itself raises where a run ends unequal, or a kill costs more."""
    script = str(ROOT / "benchmarks/faults.py")
    result = run_python(script, "--output", str(tmp_path / "faults.json"), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["kills"] == 50 and found["kills_while_a_checkpoint_was_written"] > 0
    assert all(found["equal"].values()) and found["steps_lost_most"] <= found["save_every"]
    costs = found["costs"]
    assert costs["share_of_saving_at_save_every_500"] <= 0.05
    assert costs["seconds_to_first_step_resumed"] <= costs["seconds_to_first_step_fresh"] + 10
