"""The Hessian of a linear model by its factors; whole series run in one call."""
