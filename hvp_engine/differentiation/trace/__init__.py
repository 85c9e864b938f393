"""A loss as a graph: traced, functionalized, split by partial evaluation, rewritten."""
