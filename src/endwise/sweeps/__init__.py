"""Many runs from one file: what varies, which of them share a pass, where they run, and how each ended."""

from endwise.sweeps.sweep import Sweep, sweep
from endwise.sweeps.sweep_config import SweepConfig

__all__ = ["Sweep", "SweepConfig", "sweep"]
