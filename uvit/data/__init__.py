"""What goes into training: images, data sets, latents, batches."""
