"""Data service and job files for clusters."""
