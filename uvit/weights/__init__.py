"""Models at rest: files of weights, published models, loading and saving."""
