"""Expert load and placement: which devices hold replicas of which experts, who computes which of their tokens, and when
it is worth changing. Pure: no torch, no IO, no clock; numpy. Background, bounds, figures: docs/eplb.md.

In the life of a service, all in the controller:

    window = LoadWindow()
    window = window.observe(counts, num_steps)      # counts [layers, experts], the routers' choices of these steps
    answer = decide(window, layout, units, limits, previous=placement)     # every so many steps, and after recovery

`answer` is a `Rebalance`, never None: doing nothing has a reason too (`is_change` is False then). Else, in order:

1. For each of `answer.stages`: carry out its `copies` side by side: `Copy(unit, device, source)` appends expert unit
   `unit` on `device`, read from `source`, a device that holds it when the stage begins. When all have arrived, let
   tokens go by `stage.placement`, from one step on, on all devices (in the message of a step, or of an epoch). Then
   carry out its `drops`: `Drop(unit, device)` frees a slot. At no time has an expert no holder, or a device more units
   than `limits.slots`. `answer.appended(device)` and `answer.dropped(device)` are all stages together.
2. If there is no stage only shares change: let tokens go by `answer.placement`.
3. `placement = answer.placement`: give it to the next `decide`.

Tokens go by a placement when a device computes, of the n tokens of a step that chose unit u (numbered alike on all
devices, which see the same router), those in `range(*layout.part_of(n, part, phase))`, with
`part = placement.parts(device)[u]`; a unit that is not in `parts` is computed whole by its one holder.

A step that is limited by `max_bytes` leaves the rest to the next decision; with unchanged loads those end. After a loss
use the layout of the recovery (every expert has a holder again) with the same window and placement: the counts are
per expert, not per device, so nothing has to be learned anew; the lost holders' tokens go to the others until then.
"""

from anchortp.eplb.bound import even_time, lower_bound
from anchortp.eplb.decide import Rebalance, decide, rebalance
from anchortp.eplb.limits import Limits
from anchortp.eplb.placement import Placement, device_times, placement_of
from anchortp.eplb.stages import Copy, Drop, Stage
from anchortp.eplb.window import LoadWindow

__all__ = [
    "Copy",
    "Drop",
    "Limits",
    "LoadWindow",
    "Placement",
    "Rebalance",
    "Stage",
    "decide",
    "device_times",
    "even_time",
    "lower_bound",
    "placement_of",
    "rebalance",
]
