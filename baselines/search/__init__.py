"""Searches for hyperparameters, all called with a problem and a budget: `search(problem, gradients) -> SearchResult`.

Random, grid and Bayesian search train anew for every trial, and need Optuna (`pip install -e '.[baselines]'`).
Hypernetworks train a model of the best response. Algorithm 1 is among them so that it can be compared.
"""

from baselines.search.descent import HypergradientDescent
from baselines.search.hypernetworks import LinearHypernetwork, SelfTuningNetwork
from baselines.search.problem import Search, SearchResult, TuningProblem
from baselines.search.trials import BayesianOptimization, GridSearch, RandomSearch

__all__ = [
    "BayesianOptimization",
    "GridSearch",
    "HypergradientDescent",
    "LinearHypernetwork",
    "RandomSearch",
    "Search",
    "SearchResult",
    "SelfTuningNetwork",
    "TuningProblem",
]
