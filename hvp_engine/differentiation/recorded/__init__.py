"""Products recorded from the graph of a gradient, and run again as programs without autograd."""
