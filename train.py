"""`python train.py …`: the command of uvit/commands/train.py, from a checkout."""

from uvit.commands.train import main
from uvit.common.cli import run

if __name__ == "__main__":
    run(main)
