"""Model families, and what every model has in common."""
