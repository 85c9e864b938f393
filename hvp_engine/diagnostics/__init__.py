"""Checks of a problem, of an installation, and of memory."""
