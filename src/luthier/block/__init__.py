"""Parts of a layer."""
