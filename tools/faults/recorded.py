"""Recorded products: the graph's contents, and when a program stands for it."""

from tools.faults.base import Fault

FAULTS = [
    Fault(
        "hvp_engine/differentiation/graph_structure.py",
        "[None if x.is_leaf else _edge(x) for x in inputs]",
        "[None for x in inputs]",
        "tests/test_graph_contents.py -k exchanged",
        "a weight that is no leaf is not found in the graph",
    ),
    Fault(
        "hvp_engine/differentiation/recorded/choice.py",
        "if self._saved and versions_of(self._saved) != self._versions:",
        "if versions_of(self._saved) == ():",
        "tests/test_recorded_states.py -k second_solve",
        "tensors changed since the graph was read are taken as they are now",
    ),
    Fault(
        "hvp_engine/differentiation/native/program.py",
        "key = (target, damped, mixings)",
        "key = (target, damped)",
        "tests/test_native.py",
        "one solver's update is run for another's",
    ),
    Fault(
        "hvp_engine/solvers/neumann.py",
        "of_b, self._partials = self._figures",
        "self._partials, of_b = self._figures",
        "tests/test_solvers_neumann.py",
        "the figures of the right-hand side are taken for those of the sum",
    ),
    Fault(
        "csrc/graph_contents.cpp",
        "add(address == 0 ? -1 : places_.emplace(address, place).first->second);",
        "add(-1);",
        "tests/test_graph_contents.py",
        "tensors that share memory are read as if they did not",
    ),
    Fault(
        "csrc/graph_contents.cpp",
        "if (!checked) check_packed(",
        "if (checked) check_packed(",
        "tests/test_graph_contents.py",
        "hooks that unpack saved tensors are not seen",
    ),
    Fault(
        "csrc/plain_series.cpp",
        "for (Dense& product : products_) keep_apart(&product);",
        "",
        "tests/test_short_series.py",
        "a product that is the other weight's tangent is read after that has been updated",
    ),
    Fault(
        "hvp_engine/differentiation/recorded/known_graphs.py",
        "if self.judged or before.mixed or not before.products:",
        "if self.judged or not before.products:",
        "tests/test_recorded_library.py -k by_both",
        "a solve made half by autograd and half by a program is taken for one of them",
    ),
    Fault(
        "hvp_engine/differentiation/recorded/library.py",
        "return known.plain_seconds >= cost * len(alike)",
        "return True",
        "tests/test_recorded_library.py -k earns",
        "where many kinds of graphs wait, each builds its program as if it were alone",
    ),
    Fault(
        "hvp_engine/differentiation/recorded/linearization.py",
        "        known.awaited = len(written.entries) if program is None else 0\n",
        "        known.awaited = 0\n",
        "tests/test_recorded_library.py -k wait",
        "a program that cannot be afforded yet is written down in each solve",
    ),
]
