"""What the papers say, made executable."""
