"""Data sources of a hospital, each giving rows grouped by patient."""
