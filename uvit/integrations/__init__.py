"""Bridges to other libraries, one module each."""
