"""Symmetric Taylor features: monomials of degree p, their weights, and the coefficients of the series."""
