"""Several processes, one run: how they find each other, agree, and notice that one of them is gone.

    group.py         join the others; who is first; the same value in all processes
    watch.py         end all of them when one dies or hangs
    meeting.py       find the others, by options or a scheduler, and name who is missing
    connections.py   authenticated connections between the processes

Process 0 prints and writes for all. In a process that is alone every function here returns at once.
"""

from llm_jax.processes.group import count, from_all, from_first, gathered, is_first, join, joined
from llm_jax.processes.watch import watched

__all__ = ["count", "from_all", "from_first", "gathered", "is_first", "join", "joined", "watched"]
