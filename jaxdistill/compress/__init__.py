"""Smaller models out of larger ones."""
