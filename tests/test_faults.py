"""Runs that are killed, stopped, starved of disk or fed with numbers that are none, against one that never was."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import uvit.checkpoint
import uvit.loader
import uvit.resume
from lives import assert_same, assert_same_run, at_step, end, live, live_together, metrics_of, start
from test_cli import ROOT, TINY

import train
from uvit.common.errors import InputError
from uvit.config import load_config
from uvit.data.loader import StepSampler
from uvit.training.checkpoint import checkpoint_dirs, load_checkpoint, save_checkpoint

# With workers, flips and parts of a batch, in the middle of a fourth epoch, checkpoints and log lines out of step.
OPTIONS = (
    "--data.num_workers 1 --data.flip True --train.accumulation_steps 2 --train.batch_size 600 --train.num_steps 7 "
    "--train.save_every 2 --train.log_every 3 --train.sample_every 5 --train.tracker none"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a config, tiny.py, and of a run of it that nothing happened to, whole."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "tiny.py").write_text(TINY)
    assert live(arguments_of(folder, folder / "whole"), folder / "whole.log")[0] == 0
    return folder


def arguments_of(folder, run_dir, *more):
    return [folder / "tiny.py", "--train.run_dir", run_dir, *OPTIONS, *more]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_state_file():
    original, calls = torch.save, []

    def save(state, file):
        calls.append(state)
        if len(calls) == 2:
            file.write(b"half")
            file.flush()
            die()
        original(state, file)

    torch.save = save


def die_before(module, name, count):
    """Dies at the count-th call of a function of a module."""
    original, calls = getattr(module, name), []

    def call(*arguments, **named):
        calls.append(arguments)
        if len(calls) == count:
            die()
        return original(*arguments, **named)

    setattr(module, name, call)


def die_in_a_line():
    def append_lines(path, lines):
        path.open("a").write(json.dumps({"step": 3})[:-4])
        die()

    uvit.resume.append_lines = append_lines


MOMENTS = {
    "before the first step is done": lambda: at_step(1, die),
    "between checkpoints": lambda: at_step(4, die),
    "in a state file": die_in_a_state_file,
    "before the marker": lambda: die_before(uvit.checkpoint, "_describe", 4),
    "before the checkpoint gets its name": lambda: die_before(uvit.checkpoint, "sync", 7),
    "before old checkpoints go": lambda: die_before(uvit.checkpoint, "checkpoint_dirs", 3),
    "in a line of metrics": die_in_a_line,
    "between weights and checkpoint": lambda: die_before(train, "save_checkpoint", 3),
    "between the last grid and the last checkpoint": lambda: die_before(train, "save", 4),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_ends_as_a_whole_one(moment, whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    status, _ = live(arguments, tmp_path / "log", MOMENTS[moment])
    assert status == -signal.SIGKILL
    status, _ = live(arguments, tmp_path / "log")
    assert status == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_the_run_of_these_tests_crosses_epochs():
    *_, last = (draw for _, draw in zip(range(14), StepSampler(1437, 300, 0)))
    assert 14 * 300 / 1437 > 2 and len(last.indices) == 300


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(signum, status, whole, tmp_path):
    """The signal goes to the workers too, as a terminal and a cluster send it."""

    def prepare():
        os.setpgid(0, 0)
        at_step(3, lambda: os.killpg(0, signum))

    arguments = arguments_of(whole, tmp_path / "run")
    found, lines = live(arguments, tmp_path / "log", prepare)
    name = signal.Signals(signum).name
    assert found == status
    assert lines == [
        f"stopped by {name} at step {load_checkpoint(tmp_path / 'run')['step']} of 7 in {tmp_path / 'run'}, saved"
    ]
    assert load_checkpoint(tmp_path / "run")["step"] in (3, 4)
    assert live(arguments, tmp_path / "log")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_second_ctrl_c_ends_a_run_at_once(whole, tmp_path):
    def prepare():
        def twice():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        at_step(3, twice)

    status, lines = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log", prepare)
    assert status == 130 and lines == ["stopped by Ctrl-C"]
    assert load_checkpoint(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize(("error", "status"), [(InputError, 2), (ZeroDivisionError, 1)])
def test_an_exception_in_a_worker_ends_the_run_and_its_workers(error, status, whole, tmp_path):
    def prepare():
        read = uvit.loader._Batches.__getitem__

        def fail(self, draw):
            if draw.key[1] == 6:
                raise error("no such image")
            return read(self, draw)

        uvit.loader._Batches.__getitem__ = fail

    arguments = arguments_of(whole, tmp_path / "run")
    found, lines = live(arguments, tmp_path / "log", prepare)
    assert found == status and "no such image" in lines[-1]
    assert len(lines) == 1 or error is not InputError
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert live(arguments, tmp_path / "log")[0] == 0
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
def test_a_broken_checkpoint_is_named_and_passed_over(damage, whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step_00000007")
    status, lines = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "step_00000007 is not a whole checkpoint (" in warning and warning.endswith("): passed over")
    assert any(line.startswith("going on from step 6 of 7") for line in lines)
    shutil.rmtree(tmp_path / "run/checkpoints/broken_step_00000007")
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_run_without_a_whole_checkpoint_does_not_start_over(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    for folder in checkpoint_dirs(tmp_path / "run"):
        cut(folder)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, (line,) = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 2 and line.startswith("error: ")
    assert "step_00000007 is not a whole checkpoint" in line and "remove it to start anew" in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def fill_the_disk(steps):
    """Makes the saves of these steps fail as on a full disk, half-way."""
    original = torch.save

    def save(state, file):
        if state["step"] in steps:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, file)

    torch.save = save


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole, tmp_path):
    status, lines = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log", lambda: fill_the_disk([4]))
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "step 4 could not be saved (cannot write " in warning and "No space left on device" in warning
    assert "the last good checkpoint is that of step 2" in warning
    assert_same_run(tmp_path / "run", whole / "whole")


def test_a_disk_that_is_full_at_the_end_is_an_error(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    status, lines = live(arguments, tmp_path / "log", lambda: fill_the_disk([7]))
    assert status == 1
    assert lines[-1].startswith("error: step 7 could not be saved") and "that of step 6" in lines[-1]
    assert live(arguments, tmp_path / "log")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


def test_metrics_and_grids_that_cannot_be_written_are_written_later_or_not(whole, tmp_path):
    def prepare():
        original = uvit.resume.append_lines
        calls = []

        def append_lines(path, lines):
            calls.append(path)
            if len(calls) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            original(path, lines)

        uvit.resume.append_lines = append_lines
        train.atomic_write = lambda path: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system"))

    status, lines = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log", prepare)
    assert status == 0
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 3 and "metrics.jsonl, training continues: [Errno 28] No space left" in warnings[0]
    assert all(".png, training continues: [Errno 30]" in line for line in warnings[1:])
    assert metrics_of(tmp_path / "run") == metrics_of(whole / "whole")


def test_a_vanished_folder_is_made_again(whole, tmp_path):
    def prepare():
        at_step(5, lambda: shutil.rmtree(tmp_path / "run"))

    status, lines = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log", prepare)
    assert status == 0
    assert any(line.startswith("warning: ") and "config.json is gone" in line for line in lines)
    assert_same(load_checkpoint(tmp_path / "run"), load_checkpoint(whole / "whole"))
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["num_steps"] == 7


def spoil(numbers, factor=math.nan):
    """Makes the losses of these calls of training_loss not finite."""
    original, calls = train.training_loss, []

    def training_loss(*arguments):
        calls.append(arguments)
        return original(*arguments) * (factor if len(calls) in numbers else 1)

    train.training_loss = training_loss


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_told_of(factor, whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--train.save_every", "1", "--train.keep", "9")
    status, lines = live(arguments, tmp_path / "log", lambda: spoil({8}, factor))  # a part of step 4
    assert status == 0
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith(f"warning: step 4 is left out: loss {factor}, norm of the gradient nan")
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


def test_a_gradient_that_is_not_finite_is_enough(whole, tmp_path):
    def prepare():
        original = train.training_loss
        calls = []

        def training_loss(network, *arguments):
            calls.append(0)
            loss = original(network, *arguments)
            root = next(network.parameters()).flatten()[0]
            return loss + ((root - root.detach()).abs().sqrt() if len(calls) == 8 else 0)  # 0, of infinite slope

        train.training_loss = training_loss

    status, _ = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log", prepare)
    assert status == 0
    assert metrics_of(tmp_path / "run")[1]["skipped"] and math.isfinite(metrics_of(tmp_path / "run")[1]["loss"])


def test_too_many_bad_steps_in_a_row_stop_the_run_also_across_a_kill(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--train.max_bad_steps", "3")
    message = (
        "error: 3 steps in a row had a loss or gradient that is not finite, the last step 6; "
        "the last good checkpoint is that of step 2"
    )

    def prepare():
        spoil(range(7, 99))  # from step 4 on
        at_step(6, die)

    assert live(arguments, tmp_path / "log", prepare)[0] == -signal.SIGKILL
    status, lines = live(arguments, tmp_path / "log", lambda: spoil(range(99)))
    assert (status, lines[-1]) == (1, message)
    alone = live(
        arguments_of(whole, tmp_path / "alone", "--train.max_bad_steps", "3"),
        tmp_path / "log",
        lambda: spoil(range(7, 99)),
    )
    assert (alone[0], alone[1][-1]) == (1, message)
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "alone")
    assert live(arguments, tmp_path / "log")[0] == 0  # what was wrong is put right


def test_steps_that_go_wrong_cost_no_checkpoint_from_before(whole, tmp_path):
    every = ["--train.save_every", "1", "--train.keep", "1"]
    status, lines = live(arguments_of(whole, tmp_path / "run", *every), tmp_path / "log", lambda: spoil(range(7, 99)))
    message = "error: 4 steps in a row had a loss or gradient that is not finite, the last step 7; "
    assert (status, lines[-1]) == (1, f"{message}the last good checkpoint is that of step 3")
    assert [path.name[-1] for path in checkpoint_dirs(tmp_path / "run")] == ["3", "4", "5", "6", "7"]
    for folder in checkpoint_dirs(tmp_path / "run")[1:]:
        shutil.rmtree(folder)
    assert live(arguments_of(whole, tmp_path / "run", *every), tmp_path / "log")[0] == 0
    assert [path.name[-1] for path in checkpoint_dirs(tmp_path / "run")] == ["7"]


def test_without_its_config_a_run_is_still_known_by_its_checkpoint(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    status, (line,) = live(arguments_of(whole, tmp_path / "run", "--optim.lr", "0.5"), tmp_path / "log")
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
def test_a_checkpoint_with_something_else_in_it_does_not_fit(part, value, message, whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    state = load_checkpoint(tmp_path / "run")
    state["step"] -= 1  # so that there is something to do
    if part == "optimizer":
        state["optimizer"]["state"] = {0: state["optimizer"]["state"][0]}
    else:
        state[part] = state[part] | value if isinstance(value, dict) else value
    save_checkpoint(tmp_path / "run", load_config(tmp_path / "run/config.json"), 7, state, keep=1)
    status, (line,) = live(arguments_of(whole, tmp_path / "run"), tmp_path / "log")
    assert status == 2 and "does not fit the config: " in line and message in line


def test_all_fields_that_make_another_run_are_named_and_may_be_overruled(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    other = "--optim.lr 0.5 --train.seed 3 --train.log_every 1 --train.num_steps 8".split()
    status, (line,) = live(arguments_of(whole, tmp_path / "run", *other), tmp_path / "log")
    assert status == 2
    assert "holds a run with optim.lr 0.01, got 0.5; train.seed 0, got 3: use another --train.run_dir, or" in line
    more = [*other, "--train.resume_anyway", "True"]
    status, lines = live(arguments_of(whole, tmp_path / "run", *more), tmp_path / "log")
    assert status == 0
    (line,) = [line for line in lines if line.startswith("going on from step 7 of 8")]
    assert "optim.lr 0.01, got 0.5; train.seed 0, got 3;" in line and "train.log_every 3, got 1" in line
    assert metrics_of(tmp_path / "run")[-1]["lr"] == 0.5
    wrong = [*more, "--train.num_steps", "9", "--optim.name", "adamw"]
    status, lines = live(arguments_of(whole, tmp_path / "run", *wrong), tmp_path / "log")
    assert status == 2 and lines[-1].endswith("does not fit the config: its optimizer is another one")


def test_a_longer_decay_is_told_of(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run", "--optim.decay", "cosine")
    assert live([*arguments, "--train.num_steps", "2"], tmp_path / "log")[0] == 0
    status, lines = live(arguments, tmp_path / "log")
    assert status == 0
    assert any("train.num_steps 2, got 7; so the cosine decay" in line for line in lines)


def test_the_second_run_in_a_folder_stops_and_a_crash_frees_it(whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    reading, writing = os.pipe()

    def prepare():
        def wait():
            os.write(writing, b"x")
            signal.pause()

        at_step(3, wait)

    pid = start(arguments, tmp_path / "first", prepare)
    os.read(reading, 1)
    status, (line,) = live(arguments, tmp_path / "second")
    assert status == 2
    assert line.startswith(f"error: {tmp_path / 'run'} is in use by process {pid} on ")
    os.kill(pid, signal.SIGKILL)  # its worker lives on for some seconds
    end(pid)
    assert live(arguments, tmp_path / "second")[0] == 0
    assert_same_run(tmp_path / "run", whole / "whole")


@pytest.fixture(scope="module")
def shared(whole) -> Path:
    """A run of two processes that nothing happened to."""
    assert live_together(arguments_of(whole, whole / "shared"), whole) == [0, 0]
    return whole / "shared"


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_two_that_were_not(shared, whole, tmp_path):
    arguments = arguments_of(whole, tmp_path / "run")
    for step in (3, 4):
        statuses = live_together(arguments, tmp_path, lambda rank, step=step: at_step(step, die))
        assert statuses == [-signal.SIGKILL] * 2
    assert live_together(arguments, tmp_path) == [0, 0]
    assert_same_run(tmp_path / "run", shared)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("reached", [0, 1])
def test_a_signal_to_one_process_ends_both_at_the_same_step(signum, status, reached, shared, whole, tmp_path):
    def prepare(rank):
        if rank == reached:
            at_step(3, lambda: os.kill(os.getpid(), signum))

    arguments = arguments_of(whole, tmp_path / "run")
    assert live_together(arguments, tmp_path, prepare) == [status] * 2
    assert load_checkpoint(tmp_path / "run")["step"] in (3, 4)
    assert "Traceback" not in (tmp_path / "rank_0.log").read_text() + (tmp_path / "rank_1.log").read_text()
    assert live_together(arguments, tmp_path) == [0, 0]
    assert_same_run(tmp_path / "run", shared)


@pytest.mark.slow
def test_a_bad_number_in_one_process_is_left_out_by_both(shared, whole, tmp_path):
    def prepare(rank):
        if rank == 1:
            spoil({7})

    arguments = arguments_of(whole, tmp_path / "run", "--train.save_every", "1", "--train.keep", "9")
    assert live_together(arguments, tmp_path, prepare) == [0, 0]
    assert metrics_of(tmp_path / "run")[1] == {"step": 4, "skipped": True, "loss": "nan", "grad_norm": "nan"}
    assert_same(load(tmp_path / "run", 3)["model"], load(tmp_path / "run", 4)["model"])


@pytest.mark.slow
def test_another_number_of_processes_is_told_of(whole, tmp_path):
    shutil.copytree(whole / "whole", tmp_path / "run")
    assert live_together(arguments_of(whole, tmp_path / "run", "--train.num_steps", "8"), tmp_path) == [0, 0]
    assert "train.num_steps 7, got 8; num_processes 1, got 2" in (tmp_path / "rank_0.log").read_text()
    assert load_checkpoint(tmp_path / "run")["progress"]["num_processes"] == 2


@pytest.mark.slow
def test_fifty_kills_lose_no_more_than_the_steps_since_a_checkpoint(tmp_path):
    """The script itself raises where a run ends unequal, or a kill costs more."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--output", str(tmp_path / "faults.json")]
    result = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["kills"] == 50 and found["kills_while_a_checkpoint_was_written"] > 0
    assert all(found["equal"].values()) and found["steps_lost_most"] <= found["save_every"]
    costs = found["costs"]
    assert costs["share_of_saving_at_save_every_500"] <= 0.05
    assert costs["seconds_to_first_step_resumed"] <= costs["seconds_to_first_step_fresh"] + 10
