"""What training goes down."""
