"""Training data: images, data sets, latents, batches."""
