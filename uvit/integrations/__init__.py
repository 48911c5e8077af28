"""U-ViT inside other tools, a file for each."""
