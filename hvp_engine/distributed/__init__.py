"""One problem over many processes (torch.distributed)."""

from hvp_engine.distributed.collectives import Processes
from hvp_engine.distributed.data_parallel import DataParallel, averaged, together
from hvp_engine.distributed.engine import for_loss
from hvp_engine.distributed.sharding import ShardedList

__all__ = ["DataParallel", "Processes", "ShardedList", "averaged", "for_loss", "together"]
