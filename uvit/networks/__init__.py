"""Networks and how they run: tensors in, tensors out."""
