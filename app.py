"""`python app.py …`: the command of uvit/commands/app.py, from a checkout."""

from uvit.commands.app import main
from uvit.common.cli import run

if __name__ == "__main__":
    run(main)
