"""Faults of what is recorded as CUDA graphs, which tests with recorded calls must notice."""

from tools.faults.base import Fault

SOLVES, WHOLE = "tests/test_engines_cudagraph_solves.py", "tests/test_engines_cudagraph_whole.py"

FAULTS = [
    Fault(
        "hvp_engine/engines/solves.py",
        '(first.phase if begin else "start", end - begin)',
        '("later" if begin else "start", end - begin)',
        f"{SOLVES} -k stops",
        "a recording is replayed in place of one that begins at another phase",
    ),
    Fault(
        "hvp_engine/engines/solves.py",
        "            if steps >= self._limit or all(one.finished() for one in self._iterations):\n",
        "            if steps >= self._limit:\n",
        f"{SOLVES} -k stops",
        "a recorded solve runs to its limit",
    ),
    Fault(
        "hvp_engine/engines/graphs.py",
        "self._user, self._stale = weakref.ref(user), True",
        "self._user, self._stale = weakref.ref(user), False",
        f"{WHOLE} -k more",
        "products after a whole hypergradient are at the point before",
    ),
    Fault(
        "hvp_engine/engines/cudagraph.py",
        "        if gradient.random or not functions.calm:\n",
        "        if False:\n",
        f"{WHOLE} -k random",
        "what is asked for after a whole hypergradient draws other masks",
    ),
    Fault(
        "hvp_engine/engines/graphs.py",
        "        return copies([product[:count] for product in replay()])\n",
        "        return [product[:count] for product in replay()]\n",
        f"{SOLVES} -k overwritten",
        "products with several vectors are overwritten by the next",
    ),
]
