"""What happens when: events, commands, one state machine, its story. Pure: no torch, no IO, no clock."""

from anchortp.recovery.coordinator import Coordinator, RecoveryConfig, replay
from anchortp.recovery.deadline import StepDeadline
from anchortp.recovery.progress import Progress
from anchortp.recovery.story import Episode, Line

__all__ = ["Coordinator", "Episode", "Line", "Progress", "RecoveryConfig", "StepDeadline", "replay"]
