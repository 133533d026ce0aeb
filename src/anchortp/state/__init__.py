"""The state plane: who owns a device's memory. No torch; an anchor has to be light and start fast.

- `wire`: framed messages with descriptors over a Unix socket (also used between controller and workers)
- `messages`: what an anchor is asked and what it answers
- `manifest`: what is in a device's arenas, well enough for a new process to attach
- `memory`: a device's arenas and the account of its budget
- `anchor`: the daemon of one device; `launch` starts it, `client` talks to it
- `process`: handles on processes that cannot hit a stranger who got the same pid
"""
