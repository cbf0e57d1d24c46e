"""Secure aggregation, I/O-free: PROTOCOL message by message."""
