"""The commands, one module each: arguments, checks, one call."""
