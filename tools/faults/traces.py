"""Faults of the recorder of graphs and of tensors without values."""

from tools.faults.base import Fault

RECORDER, RECORDED = "hvp_engine/differentiation/trace/graph_recorder.py", "tests/test_trace_graph_recorder.py"
ALIASES = "hvp_engine/differentiation/trace/alias_recorder.py"
WATCH = "hvp_engine/differentiation/trace/value_watch.py"

FAULTS = [
    Fault(
        WATCH,
        "        self._keep(*_asked(func, args, keywords, result))\n",
        "",
        "tests/test_trace_values.py -k not_traced",
        "a trace keeps how many ones the first batch's mask had",
    ),
    Fault(
        WATCH,
        "nodes += [*node.all_input_nodes, *self._writes.get(node, ())]",
        "nodes += node.all_input_nodes",
        RECORDED,
        "what is written through a view does not change the tensor",
    ),
    Fault(
        WATCH,
        'node.op == "placeholder" or torch.Tag.nondeterministic_seeded in tags_of(node.target)',
        'node.op == "placeholder"',
        RECORDED,
        "a random number that Python reads is the same in all calls",
    ),
    Fault(
        RECORDER,
        "_INSTEAD = WITH_MEMORY | {aten.lift_fresh.default: aten.lift_fresh_copy.default}",
        "_INSTEAD = WITH_MEMORY",
        RECORDED,
        "a tensor made of numbers keeps what was written into it",
    ),
    Fault(
        ALIASES,
        "and shares_storage(tensor)",
        "and False",
        RECORDED,
        "a tensor that the loss reads beside its batch is taken for the batch's",
    ),
    Fault(
        "hvp_engine/differentiation/abstract_tensor.py",
        "[1 if dim in summed else size for dim, size in enumerate(x.shape) if keep or dim not in summed]",
        "[1 if dim in summed else size for dim, size in enumerate(x.shape) if dim not in summed]",
        "tests/test_abstract_tensor.py",
        "a sum that keeps its dimensions is thought to have lost them",
    ),
    Fault(
        ALIASES,
        "or node is not None and self._memories.get(node) == memory._cdata",
        "or node is not None",
        RECORDED,
        "a tensor that was given other memory is what it was",
    ),
    Fault(
        ALIASES,
        "        if not nodes or any(",
        "        if True or any(",
        RECORDED,
        "a tensor that Python makes of a recorded one counts as one from outside",
    ),
    Fault(
        WATCH,
        '_MAKERS = {"tensor", ',
        "_MAKERS = {",
        RECORDED,
        "torch.tensor of a batch's elements keeps those of the first batch",
    ),
    Fault(
        "hvp_engine/engines/surroundings.py",
        "return version_of(self._tensor), held",
        'return version_of(self._tensor), b""',
        RECORDED,
        "what is written by way of tensor.data is not seen",
    ),
]
