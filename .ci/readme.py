"""Runs every command and example of the README, shortened, so that it cannot rot: `python .ci/readme.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What a command becomes: a pattern, and what takes its place.
SHORTENED = [
    (r"^make demo$", "make demo TRAIN_ARGS='--train.num_steps 20' EVALUATE_ARGS='--num_images 20'"),
    (r"(train\.py configs/digits\.py.*)$", r"\1 --train.num_steps 20"),
    (r"(evaluate\.py .*)$", r"\1 --num_images 20"),
]
# What is not run here, and why.
SKIPPED = {
    "git clone": "this is the clone",
    "pip install": "make has installed it",
    "make test": "has just run",
    "make bench": "takes long: its figures are measured by hand and committed",
    "cifar10": "downloads a data set",
}


def main() -> None:
    """Runs the blocks in their order and stops at the first that fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S):
        commands = block.splitlines() if language == "bash" else [block]
        for command in commands:
            command = command.partition("  #")[0].strip() if language == "bash" else command
            reason = next((reason for text, reason in SKIPPED.items() if text in command), None)
            if reason or not command:
                print(f"-- skipped ({reason}): {command}" if reason else "", flush=True)
                continue
            for pattern, short in SHORTENED:
                command = re.sub(pattern, short, command) if language == "bash" else command
            print(f"-- {command}", flush=True)
            arguments = ["bash", "-ec", command] if language == "bash" else [sys.executable, "-c", command]
            subprocess.run(arguments, cwd=ROOT, env=environment, check=True)
    print("README: every command ran")


if __name__ == "__main__":
    main()
