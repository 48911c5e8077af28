"""Bridges to other libraries, one module each, imported by name."""
