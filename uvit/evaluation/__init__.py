"""From sets of images to figures such as the FID."""
