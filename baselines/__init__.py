"""What the paper compares implicit differentiation with, built on the library and left out of its wheel.

`baselines.estimators` are other ways to a hypergradient, `baselines.search` ways to hyperparameters without one, and
`baselines.methods` is the one list of all methods, those of the library included. Benchmarks, examples and the tables
of the documentation go by that list. Run Python in the root of the repository to import them.
"""
