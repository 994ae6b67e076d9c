"""How it goes down."""
