"""What every room needs: arguments, trees, flat vectors, random state, private torch."""
