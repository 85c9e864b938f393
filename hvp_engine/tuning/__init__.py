"""Algorithm 1 as a loop that can be watched, interrupted and continued exactly."""

from hvp_engine.tuning.callbacks import Callback
from hvp_engine.tuning.history import History, Record
from hvp_engine.tuning.tuner import Tuner

__all__ = ["Callback", "History", "Record", "Tuner"]
