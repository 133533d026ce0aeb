"""What happens when: events, commands, one state machine, its story. Pure: no torch, no IO, no clock."""

from anchortp.recovery.coordinator import Coordinator, RecoveryConfig, replay
from anchortp.recovery.deadline import StepDeadline
from anchortp.recovery.story import Episode, Line

__all__ = ["Coordinator", "Episode", "Line", "RecoveryConfig", "StepDeadline", "replay"]
