"""Attention whose value, first and second derivatives need memory that grows with the length, not with its square."""
