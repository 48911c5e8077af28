"""`python evaluate.py …`: the command of uvit/commands/evaluate.py, from a checkout."""

from uvit.commands.evaluate import main
from uvit.common.cli import run

if __name__ == "__main__":
    run(main)
