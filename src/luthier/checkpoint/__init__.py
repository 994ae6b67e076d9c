"""Hugging Face checkpoints on disk: read lazily, written atomically."""
