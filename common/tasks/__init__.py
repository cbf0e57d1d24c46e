"""Tasks: pure functions that run at a hospital (phi) and at the hub (advance)."""
