"""One problem over many processes (torch.distributed)."""

from hvp_engine.distributed.data_parallel import DataParallel, averaged, together
from hvp_engine.distributed.engine import for_loss
from hvp_engine.distributed.held import Held
from hvp_engine.distributed.processes import Processes

__all__ = ["DataParallel", "Held", "Processes", "averaged", "for_loss", "together"]
