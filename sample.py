"""`python sample.py …`: the command of uvit/commands/sample.py, from a checkout."""

from uvit.commands.sample import main
from uvit.common.cli import run

if __name__ == "__main__":
    run(main)
