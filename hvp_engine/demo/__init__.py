"""The main job on real data: one weight decay for every weight of a network, tuned on a validation set.

`python -m hvp_engine demo` trains the same network on handwritten digits four times, from the same start and on the
same batches: without tuning, with one decay for all weights, and twice with one decay for each weight, by implicit
differentiation (20 Hessian-vector products) and by differentiating through 20 unrolled steps of SGD. It compares
losses, time and memory.
"""

from hvp_engine.demo.command import add_arguments, main

__all__ = ["add_arguments", "main"]
