"""Which numbers may move."""
