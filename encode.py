"""`python encode.py …`: the command of uvit/commands/encode.py, from a checkout."""

from uvit.commands.encode import main
from uvit.common.cli import run

if __name__ == "__main__":
    run(main)
