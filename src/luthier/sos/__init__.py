"""Polynomials certified as sums of squares."""
