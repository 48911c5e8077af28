"""Errors, files, the hub, command lines and signals: general helpers, independent of diffusion models."""
