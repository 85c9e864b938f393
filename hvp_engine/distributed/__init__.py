"""One problem over many processes (torch.distributed)."""

from hvp_engine.distributed.collectives import Processes
from hvp_engine.distributed.data_parallel import DataParallel, averaged, together
from hvp_engine.distributed.engine import for_loss
from hvp_engine.distributed.sharding import Held

__all__ = ["DataParallel", "Held", "Processes", "averaged", "for_loss", "together"]
