"""Where people already work: a module for each library, imported by name."""
