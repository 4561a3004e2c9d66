"""The runs of a plan become records: cached ones are read, others run in a child each.

A process of its own for every run: allocator state, crashes and running out of memory stay in it, and
what ended it is a status in its record, never the end of the bench.
"""

from harness.bench.loop import STOPPING, Busy, Done, bench, cached, lock, stale
from harness.bench.places import chosen
from harness.bench.probing import probes

__all__ = ["STOPPING", "Busy", "Done", "bench", "cached", "chosen", "lock", "probes", "stale"]
