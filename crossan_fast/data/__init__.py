"""Readers of users' files, splits, and the synthetic shop."""
