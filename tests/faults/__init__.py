"""Faults at seeded points of real federations, and what must hold after each of them."""
