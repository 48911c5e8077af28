"""Errors, files, the hub, command lines and signals: nothing here knows what the project is for."""
