"""What every party computes or checks for itself."""
