"""General helpers, independent of diffusion models: errors, files, the hub, command lines, signals."""
