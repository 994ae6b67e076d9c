"""The decoder whose slots Parts fill."""
