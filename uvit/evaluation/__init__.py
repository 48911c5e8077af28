"""From sets of images to figures."""
