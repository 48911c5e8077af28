"""The command lines, a module each: arguments, checks, one call."""
