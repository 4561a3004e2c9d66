"""What a run costs: seconds, bytes, joules."""

from harness.measuring.meter import Meter, StepClock, host_peak
from harness.measuring.tensors import LiveTensors, rehearse, tensors

__all__ = ["LiveTensors", "Meter", "StepClock", "host_peak", "rehearse", "tensors"]
