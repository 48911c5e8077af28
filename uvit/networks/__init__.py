"""The networks: U-ViT, the contract of a network, and the frozen encoders. Nothing here saves, samples or trains."""
