"""Networks on disk: weight files, published models, loading and saving, model cards."""
