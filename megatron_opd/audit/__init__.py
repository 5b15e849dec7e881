"""Proof on the user's own machine and layout that value and gradient are right."""
