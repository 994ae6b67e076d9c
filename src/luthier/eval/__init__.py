"""Numbers about models."""
