"""Ways to hyperparameters on one problem and one budget: `search(problem, gradients) -> SearchResult`.

Random, grid and Bayesian search train anew for every trial, and need Optuna (`pip install hvp_engine[search]`);
hypernetworks train a model of the best response; Algorithm 1 is there to compare with.
"""

from hvp_engine.search.descent import HypergradientDescent
from hvp_engine.search.hypernetworks import LinearHypernetwork, SelfTuningNetwork
from hvp_engine.search.problem import Search, SearchResult, TuningProblem
from hvp_engine.search.trials import BayesianOptimization, GridSearch, RandomSearch

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
