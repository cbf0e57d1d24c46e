"""The coordinator's hub."""
