"""Differential privacy: the gate, its noise, its events and its filter."""
