"""Models in motion: tensors in, tensors out. No file, no hub, no loop."""
