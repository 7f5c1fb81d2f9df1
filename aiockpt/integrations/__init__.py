"""Doors for the training frameworks that people use; each needs its own package."""
