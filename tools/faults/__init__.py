"""Faults that the tests must notice: mistakes that somebody could make, one list for each part of the library."""

from tools.faults.attention import FAULTS as ATTENTION
from tools.faults.base import Fault
from tools.faults.convolution import FAULTS as CONVOLUTION
from tools.faults.cuda import FAULTS as CUDA
from tools.faults.examples import FAULTS as EXAMPLES
from tools.faults.graphs import FAULTS as GRAPHS
from tools.faults.hypergradients import FAULTS as HYPERGRADIENTS
from tools.faults.losses import FAULTS as LOSSES
from tools.faults.native import FAULTS as NATIVE
from tools.faults.ops import FAULTS as OPS
from tools.faults.recorded import FAULTS as RECORDED
from tools.faults.recurrent import FAULTS as RECURRENT
from tools.faults.solvers import FAULTS as SOLVERS
from tools.faults.support import FAULTS as SUPPORT
from tools.faults.traces import FAULTS as TRACES
from tools.faults.tuning import FAULTS as TUNING
from tools.faults.writings import FAULTS as WRITINGS

__all__ = ["FAULTS", "Fault"]

FAULTS: list[Fault] = [
    *OPS,
    *CUDA,
    *GRAPHS,
    *TRACES,
    *NATIVE,
    *CONVOLUTION,
    *ATTENTION,
    *RECURRENT,
    *LOSSES,
    *RECORDED,
    *WRITINGS,
    *SUPPORT,
    *SOLVERS,
    *HYPERGRADIENTS,
    *TUNING,
    *EXAMPLES,
]
