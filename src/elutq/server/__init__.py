"""Serving a model to many at once."""
