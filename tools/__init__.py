"""What helps to develop the library and is not part of it."""
