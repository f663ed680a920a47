"""Side networks over frozen foundation models for sequential recommendation."""
