"""Against merging, and what undoes it."""
