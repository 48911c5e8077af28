"""The loop, and all that a run goes on with."""
