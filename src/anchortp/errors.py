"""The error tree. Every error that a user can meet derives from `AnchorTPError`.

```
AnchorTPError
├── UserError                 wrong input: what was given, what to do
│   ├── ConfigError             a model folder, option or config that cannot be served
│   ├── UnsupportedModel        an architecture or feature that is not implemented
│   ├── CheckpointError         a weight file that is missing, short or not what the config says
│   └── RequestError            a request that can never be served (also: too long)
├── CapacityError             the numbers do not fit
│   ├── BudgetExceeded          a device's memory budget; carries the numbers
│   │   └── DeviceFull            the device itself has less memory than its budget says
│   ├── DoesNotFit              no layout fits the devices that are left; carries the numbers
│   └── EngineFull              too many requests are waiting; try again later
├── StateError                the state plane
│   ├── StaleEpoch              the message belongs to a group that is gone
│   ├── LeaseHeld               another process is the worker of this device
│   ├── ArenaUnknown            no arena of that name
│   ├── AnchorRunning           the device already has an anchor
│   └── ManifestInvalid         a manifest that is torn, foreign or of another version
├── WireError                 a connection between our processes
│   ├── ChannelClosed           the peer is gone
│   ├── ChannelTimeout          the peer did not answer in time
│   └── ProtocolError           the peer does not speak our protocol
├── GroupError                a collective of one epoch
│   ├── GroupAborted            the group was dissolved; leave and wait for the next epoch
│   └── GroupTimeout            a member did not arrive
└── EngineStopped             the engine does not serve (stopping, or cannot recover)
```
"""

from __future__ import annotations


def in_words(num_bytes: int) -> str:
    """`140.6 GB (140,633,518,080 bytes)`: to be grasped, and to be compared."""
    exact = f"{num_bytes:,} bytes"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit} ({exact})"
    return exact


class AnchorTPError(Exception):
    """Base of all errors raised on purpose by this package."""


class UserError(AnchorTPError):
    """Wrong input. The message names what was given and what to do instead."""


class ConfigError(UserError):
    pass


class UnsupportedModel(UserError):
    pass


class CheckpointError(UserError):
    pass


class RequestError(UserError):
    pass


class CapacityError(AnchorTPError):
    """Something does not fit; the message carries the numbers."""


class BudgetExceeded(CapacityError):
    """A commit would exceed a device's memory budget. All sizes in bytes."""

    def __init__(self, *, device: str, requested_bytes: int, committed_bytes: int, budget_bytes: int):
        self.device = device
        self.requested_bytes = requested_bytes
        self.committed_bytes = committed_bytes
        self.budget_bytes = budget_bytes
        super().__init__(
            f"{device}: {in_words(requested_bytes)} more do not fit: {in_words(committed_bytes)} of "
            f"{in_words(budget_bytes)} are in use. "
            f"Give the device a larger budget, use more devices, or keep less KV cache."
        )


class DeviceFull(BudgetExceeded):
    """The budget would allow it, but the hardware has no more: others use it too. All sizes in bytes."""

    def __str__(self) -> str:
        return (
            f"{self.device}: the GPU has no room for {in_words(self.requested_bytes)} more, though only "
            f"{in_words(self.committed_bytes)} of the budget of {in_words(self.budget_bytes)} are in use. End "
            f"what else uses the GPU, or start the anchors of its devices with smaller budgets."
        )


class DoesNotFit(CapacityError):
    pass


class EngineFull(CapacityError):
    pass


class StateError(AnchorTPError):
    pass


class StaleEpoch(StateError):
    def __init__(self, message: str = "", *, epoch: int = -1, current: int = -1):
        self.epoch = epoch
        self.current = current
        super().__init__(message or f"epoch {epoch} is over (now {current}); attach again with the current epoch")


class LeaseHeld(StateError):
    pass


class ArenaUnknown(StateError):
    pass


class AnchorRunning(StateError):
    pass


class ManifestInvalid(StateError):
    pass


class WireError(AnchorTPError):
    pass


class ChannelClosed(WireError):
    pass


class ChannelTimeout(WireError):
    pass


class ProtocolError(WireError):
    pass


class GroupError(AnchorTPError):
    pass


class GroupAborted(GroupError):
    def __init__(self, epoch: int, reason: str = ""):
        self.epoch = epoch
        super().__init__(f"the group of epoch {epoch} was dissolved" + (f": {reason}" if reason else ""))


class GroupTimeout(GroupError):
    def __init__(self, epoch: int, missing: tuple[int, ...], timeout_s: float):
        self.epoch = epoch
        self.missing = missing
        super().__init__(f"epoch {epoch}: rank(s) {missing} did not arrive within {timeout_s} s")


class EngineStopped(AnchorTPError):
    pass
