"""Tangent programs as lists of operations that the extension runs, for all terms of a solve in one call."""
