"""What goes on inside models."""
