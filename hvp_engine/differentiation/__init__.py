"""From a loss to products with its Hessian: by double backward, or by a traced and split graph."""
