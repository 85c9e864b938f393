"""What all other subpackages use: arguments, trees, flat vectors, random state, private torch."""
