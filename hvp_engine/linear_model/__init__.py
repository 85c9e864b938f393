"""The Hessian of a linear model from its factors, whole series in one call."""
