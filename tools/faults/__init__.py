"""Faults that the tests must notice: mistakes that somebody could make, one list for each part of the library."""

from tools.faults.base import Fault
from tools.faults.cuda import FAULTS as CUDA
from tools.faults.hypergradients import FAULTS as HYPERGRADIENTS
from tools.faults.losses import FAULTS as LOSSES
from tools.faults.native import FAULTS as NATIVE
from tools.faults.ops import FAULTS as OPS
from tools.faults.solvers import FAULTS as SOLVERS
from tools.faults.support import FAULTS as SUPPORT
from tools.faults.tuning import FAULTS as TUNING

__all__ = ["FAULTS", "Fault"]

FAULTS: list[Fault] = [*OPS, *CUDA, *NATIVE, *LOSSES, *SUPPORT, *SOLVERS, *HYPERGRADIENTS, *TUNING]
