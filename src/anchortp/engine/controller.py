"""The engine: scheduler, workers and recovery around one event loop, on a thread of its own.

`ElasticEngine.step` reads as the architecture: schedule, run, postprocess. A fault cuts a step off; the batch is
then simply not postprocessed, the coordinator's commands are carried out, and the next step plans the same
work again on whoever is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import selectors
import socket
import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchortp.comm import ShmRegion
from anchortp.config import EngineConfig
from anchortp.devices import check_engine_devices
from anchortp.engine import messages as m
from anchortp.engine.api import DeviceChange, EngineRequest, Sink, TokenOutput
from anchortp.engine.blocks import BlockPool
from anchortp.engine.faults import Strike
from anchortp.engine.keeper import KVKeeper
from anchortp.engine.mirror_addresses import HOST
from anchortp.engine.plane import StatePlane
from anchortp.engine.pool import WorkerPool, WorkerProcess
from anchortp.engine.scheduler import Batch, Scheduler
from anchortp.errors import (
    AnchorTPError,
    BudgetExceeded,
    ConfigError,
    EngineFull,
    EngineStopped,
    RequestError,
    WireError,
)
from anchortp.layout import EXPERT, KV, ModelUnits, empty_shard, model_units
from anchortp.plan import FromPeer, Move
from anchortp.recovery import Coordinator, Progress, RecoveryConfig, StepDeadline
from anchortp.recovery import events as ev
from anchortp.recovery.coordinator import IDLE, REFUSING, SERVING
from anchortp.recovery.devices import slots_after_a_loss
from anchortp.state.process import wait_dead
from anchortp.state.wire import private_directory
from anchortp.transfer.fingerprint import fingerprint

if TYPE_CHECKING:
    from anchortp.engine.balancer import ExpertBalancer

log = logging.getLogger("anchortp.engine")

POISON_CUTS = 5  # a request whose batches killed a worker so often in a row is ended, not tried again
STOP_TIMEOUT_S = 5.0
BACKLOG_POLL_S = 1e-3
BACKGROUND_PACE = 0.5  # share of the time in which bytes move while steps are computed
PUBLISH_EVERY_S = 0.1
MAX_EPISODES_SHOWN = 32  # the latest, in all of `episodes`, `faults` and `changes`
CALM_S = 1.0  # before memory is made ready for the next loss
AHEAD_SHARE = 0.1  # of a step's time is spent on that after it, or the least that can be done, until all of it is ready
ADOPT_AFTER_S = 0.02


class _StepCut(Exception):
    """The step in flight will not be answered: its group is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ahead:
    """Memory being made ready, in one epoch: from `due_s` on, `StatePlane.commit_ahead` a little at a time."""

    epoch: int
    due_s: float
    work: Iterator[dict[str, list[tuple[int, int]]]]


class ElasticEngine:
    """An `api.Engine`. [server process, one thread of its own]

    `start` returns at once; `wait_ready` waits for the first time that it serves. After `stop` no process of
    its own is left; anchors that an engine started are stopped too, unless `keep_anchors`.
    """

    def __init__(self, config: EngineConfig, *, strikes: tuple[Strike, ...] = (), keep_anchors: bool = False):
        self.config = config
        self.max_model_len = config.max_model_len
        self.vocab_size = config.model.vocab_size
        self.units = model_units(config.model)
        self.recovery = Coordinator(self.units, _recovery_config(config))
        self.pool = BlockPool(
            num_blocks=config.kv_blocks, block_size=config.kv_block_size, on_change=self._on_block_change
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=config.max_model_len,
            max_waiting=config.max_waiting,
        )
        self._strikes = strikes
        self._keep_anchors = keep_anchors
        self._deadline = StepDeadline(floor_s=config.min_step_deadline_s)
        self._balancer = _expert_balancer(config, self.units)
        self._thread = threading.Thread(target=self._main, name="anchortp-engine", daemon=True)
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._inbox: deque[Callable[[], None]] = deque()
        self._num_queued = 0  # submitted and not yet with the scheduler
        self._lock = threading.Lock()
        self._sinks: dict[str, Sink] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._keeper: KVKeeper | None = None
        self._region: ShmRegion | None = None
        self._ranks: tuple[str, ...] = ()
        self._answer: m.StepDone | None = None
        self._outputs: list[TokenOutput] = []  # not delivered yet
        self._ahead: _Ahead | None = None
        self._events: deque[ev.Event] = deque()
        self._handling = False
        self._suspects: Counter[str] = Counter()
        self._adopting: dict[str, threading.Thread] = {}  # each starts an anchor
        self._handing_over: set[str] = set()  # devices whose worker has not answered yet
        self._progress = Progress()  # of the loads that are awaited
        self._sums: dict[str, str] = {}  # what units must add up to, learned when they were first loaded
        self._record: ev.Record | None = None  # not written yet
        self._num_changes = 0
        self._starting: dict[str, threading.Thread] = {}  # anchors, for changes
        self._story_lines = 0
        self._first_tokens: dict[int, float] = {}
        self._publish_due_s = 0.0
        self._counters: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._refusal = ""
        self._failure: BaseException | None = None
        self._status: dict[str, Any] = {"state": "starting", "epoch": 0}

    # ------------------------------------------------------------------------------ any thread: the front door

    def start(self) -> None:
        """Takes the runtime directory and starts. Raises ConfigError if another engine has it."""
        runtime_dir = private_directory(self.config.runtime_dir)
        self._lock_file = (runtime_dir / "engine.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock_file.close()
            raise ConfigError(
                f"another engine serves from {runtime_dir}; stop it, or choose another --runtime-dir."
            ) from None
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when the engine serves. Raises EngineStopped with the reason if it cannot, or in time."""
        if not self._ready.wait(timeout_s):
            raise EngineStopped(f"the engine was not ready within {timeout_s} s; see its log for where it waits")
        if self._failure is not None:
            raise EngineStopped(f"the engine could not start: {self._failure}") from self._failure
        if self._refusal:
            raise EngineStopped(self._refusal)

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        with self._lock:  # `_close` tells everybody who came in before it took the lock
            self._check_serving()
            if self.scheduler.num_waiting + self._num_queued >= self.config.max_waiting:
                raise EngineFull(f"{self.config.max_waiting} requests are waiting, the limit; try again later")
            self._num_queued += 1
            self._inbox.append(lambda: self._admit(request, sink))
        self._wake()

    def abort(self, request_id: str) -> None:
        def drop() -> None:
            self.scheduler.abort(request_id)
            self._sinks.pop(request_id, None)

        self._post(drop)

    def change_devices(self, change: DeviceChange) -> int:
        check_engine_devices(dict.fromkeys([*change.add, self.config.devices[0]]))
        named = [*change.add, *change.remove]
        if len(set(named)) != len(named) or not (named or change.speeds is not None):
            raise ConfigError("a change names at least one device to add or to remove, each once, or speeds.")
        with self._lock:
            self._check_serving()
            self._num_changes += 1
            change_id = self._num_changes
            self._inbox.append(lambda: self._begin_change(change, change_id))
        self._wake()
        return change_id

    def status(self) -> dict[str, Any]:
        return self._status

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends everything this engine started; requests still open end with an error. Idempotent."""
        self._stopping.set()
        self._wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
            assert not self._thread.is_alive(), "the engine's thread does not end"
        if getattr(self, "_lock_file", None) is not None:
            self._lock_file.close()

    def _check_serving(self) -> None:
        if self._failure is not None or self._stopping.is_set():
            raise EngineStopped("the engine is stopping or has failed; start it again")
        if self._refusal:
            raise EngineStopped(self._refusal)

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_in.send(b"\0", socket.MSG_DONTWAIT)

    # ------------------------------------------------------------------------------------- the engine's thread

    def _main(self) -> None:
        try:
            self._open()
            while not self._stopping.is_set():
                self._run_inbox()
                if self.recovery.wants_switch:
                    self._handle(ev.Switch())
                if self.recovery.phase == SERVING and self.scheduler.has_work():
                    self.step()
                else:
                    self._deliver()
                    self._write_record()
                    self._publish_if_due()
                    self._pump(0.0 if self._prepare_for_a_loss() else self._idle_timeout())
        except BaseException as error:
            log.exception("the engine failed")
            self._failure = error
        finally:
            self._ready.set()
            self._close()

    def step(self) -> None:
        """One step: schedule, run, postprocess.

        What the last step made is put out while the workers compute: they wait for nothing but the schedule.
        """
        batch = self.scheduler.schedule()
        self._outputs += self.scheduler.take_failures()
        if batch is None:
            self._deliver()
            return
        began_s = time.monotonic()
        try:
            answer = self._run(batch)
        except _StepCut:
            return
        took_s = time.monotonic() - began_s
        self._outputs += self.scheduler.postprocess(batch, answer.sampled, self.config.model.eos_token_ids)
        self._keeper.save_sealed(self.recovery.layout, self.recovery.epoch)
        self._rebalance_if_due()
        self._prepare_for_a_loss(AHEAD_SHARE * took_s)
        if not self.scheduler.has_work():
            self._deliver()
            self._write_record()
            self._publish()  # what an idle engine shows is how its last step left it

    def _run(self, batch: Batch) -> m.StepDone:
        """Sends the batch to every worker and waits for rank 0. Raises _StepCut when a fault comes first."""
        epoch, began_s = self.recovery.epoch, time.monotonic()
        deadline_s = began_s + self._deadline.for_step(batch.num_tokens)
        if self.recovery.load_deadline_s is not None:  # the first layers may compute while the last still arrive
            deadline_s = max(deadline_s, self.recovery.load_deadline_s)
        self._answer = None
        message = m.RunStep(epoch=epoch, batch=batch)
        for device in self._ranks:
            self._send(device, message)
        if self._outputs:
            self._deliver()
            self._write_record()
        self._publish_if_due()
        while True:
            self._pump(min(deadline_s - time.monotonic(), 1.0))
            if self.recovery.epoch != epoch or self.recovery.phase != SERVING or self._stopping.is_set():
                self._suspect(batch)
                raise _StepCut
            answer = self._answer
            if answer is not None and (answer.epoch, answer.step) == (epoch, batch.step):
                break
            if time.monotonic() >= deadline_s:
                self._accuse(batch, time.monotonic() - began_s)
                deadline_s = time.monotonic() + self.recovery.config.leave_timeout_s
        seconds = time.monotonic() - began_s
        if self.recovery.is_whole:
            self._deadline.observe(batch.num_tokens, seconds)
        if self._balancer is not None:
            self._balancer.step_done(seconds, answer.expert_load)
        self._counters["steps"] += 1
        self._counters["computed_tokens"] += batch.num_tokens
        for seq in batch.seqs:
            self._suspects.pop(seq.request_id, None)
        if self._processes.num_spares_ready < self.config.num_spares:
            self._processes.replenish()
        return answer

    def _accuse(self, batch: Batch, seconds: float) -> None:
        """The deadline is over: the ranks that came least far are the ones the others wait for."""
        assert self._region is not None
        steps, progress = self._region.steps(), self._region.progress()
        far = [(step, arrived) for step, arrived in zip(steps, progress, strict=True)]
        for rank, device in enumerate(self._ranks):
            if far[rank] == min(far):
                reason = f"step of {batch.num_tokens} tokens not done after {seconds:.2f} s"
                self._handle(ev.WorkerHung(device=device, reason=reason))

    def _suspect(self, batch: Batch) -> None:
        """A request that is in every batch that kills a worker is the likely cause; it is not tried for ever."""
        for seq in batch.seqs:
            self._suspects[seq.request_id] += 1
            if self._suspects[seq.request_id] >= POISON_CUTS:
                self.scheduler.abort(seq.request_id)
                error = f"steps with this request were cut off by faults {POISON_CUTS} times in a row"
                self._deliver([_failed(seq.request_id, error)])
                del self._suspects[seq.request_id]

    def _deliver(self, more: Iterable[TokenOutput] = ()) -> None:
        """Puts out what the last step made, and `more` after it."""
        outputs, self._outputs = [*self._outputs, *more], []
        for output in outputs:
            self._counters["generated_tokens"] += len(output.tokens)
            sink = self._sinks.get(output.request_id)
            if output.finish_reason is not None:
                self._sinks.pop(output.request_id, None)
                self._counters[f"finished_{output.finish_reason}"] += 1
            if sink is not None:
                sink(output)
        if outputs and outputs[0].tokens:
            index = self.recovery.served
            if index not in self._first_tokens:
                self._first_tokens[index] = time.monotonic()
                self._publish()

    def _admit(self, request: EngineRequest, sink: Sink) -> None:
        with self._lock:
            self._num_queued -= 1
        try:
            self._check_serving()
            self.scheduler.add(request)
            self._sinks[request.request_id] = sink
        except (EngineFull, EngineStopped, RequestError) as error:
            sink(_failed(request.request_id, str(error)))

    # -------------------------------------------------------------------------------------- opening and closing

    def _open(self) -> None:
        self._watch(self._wake_out.fileno(), self._drain_wake)
        self._processes = WorkerPool(
            runtime_dir=self.config.runtime_dir,
            num_spares=self.config.num_spares,
            spare=m.ForkSpare(gpus=self.config.gpus, fused=self.config.model if self.config.triton else None),
            watch=self._watch,
            unwatch=self._unwatch,
            on_message=self._on_worker_message,
            on_end=self._on_worker_end,
        )
        self._processes.start()
        self._fingerprint = fingerprint(self.config.model_folder, self.config.model)
        self._plane = StatePlane(
            self.config,
            self.units,
            self._fingerprint,
            watch=self._watch,
            unwatch=self._unwatch,
            on_gone=self._on_anchor_gone,
        )
        found = tuple(self._plane.open(device) for device in self.config.devices)
        self._keeper = KVKeeper(self.config, self._fingerprint, self._plane, self.pool, self.scheduler, self._send)
        self._keeper.open()
        epoch = self._plane.newest_epoch() + 1
        num_kv_blocks = self._attach_kv(found, epoch)
        self._handle(ev.Start(devices=found, epoch=epoch, num_kv_blocks=num_kv_blocks))

    def _attach_kv(self, found: tuple[ev.DeviceFound, ...], epoch: int) -> int:
        """Takes over the KV planes of an earlier engine, if all agree; returns how many blocks they have."""
        num_kv_blocks, epochs = self._plane.found_kv()
        if num_kv_blocks and self._keeper.attach(epochs):
            return num_kv_blocks
        for device in found:
            if device.shard is not None:
                self._plane.drop_kv(device.device, epoch)
        return 0

    def _on_block_change(self, block_id: int, block_hash: bytes | None) -> None:
        if self._keeper is not None:
            self._keeper.changed(block_id, block_hash)

    def _on_anchor_gone(self, device: str) -> None:
        if device == HOST:
            self._keeper.host_gone()
            self._save_while_idle()
        else:
            self._handle(ev.AnchorGone(device=device))

    def _close(self) -> None:
        with self._lock:
            self._stopping.set()
        if self._region is not None:
            self._region.abort("the engine stops")
        for thread in [*self._adopting.values(), *self._starting.values()]:
            thread.join()  # an anchor that is being started: bounded, and it has to be stopped too
        self._run_inbox()
        for request_id in list(self._sinks):
            self._deliver([_failed(request_id, "the engine stopped")])
        if hasattr(self, "_processes"):
            self._processes.stop(STOP_TIMEOUT_S)
        if self._keeper is not None:
            self._keeper.close()
        if hasattr(self, "_plane"):
            self._write_record()
            self._plane.close(stop_anchors=not self._keep_anchors)
        if self._region is not None:
            self._region.close()
        self._remove_stores()
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._publish("stopped")

    # ---------------------------------------------------------------------------------------------- event loop

    def _watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(fd)

    def _pump(self, timeout_s: float) -> None:
        """Waits for anything to happen, at most `timeout_s`, and handles it."""
        timeout_s = max(0.0, timeout_s)
        for process in self._workers.values():
            if process.channel.has_backlog:
                # A message larger than the socket's buffer; a reader that is alive takes the rest soon.
                timeout_s = min(timeout_s, BACKLOG_POLL_S)
                with contextlib.suppress(WireError):
                    process.channel.flush()
        for key, _ in self._selector.select(timeout_s):
            if self._selector.get_map().get(key.fd) is key:  # not unwatched by a callback before it
                key.data()
        due_s = self.recovery.deadline_s
        if due_s is not None and time.monotonic() >= due_s:
            self._handle(ev.Tick())

    def _idle_timeout(self) -> float:
        due_s = self.recovery.deadline_s
        return 1.0 if due_s is None else min(1.0, due_s - time.monotonic())

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(4096, socket.MSG_DONTWAIT):
                pass

    def _run_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _on_worker_message(self, process: WorkerProcess, message: Any) -> None:
        device = process.device
        if device is None or self._workers.get(device) is not process:
            return
        match message:
            case m.StepDone():
                self._answer = message
            case m.WorkerAttached(epoch=epoch):
                self._handle(ev.Attached(device=device, epoch=epoch))
            case m.EpochLeft(epoch=epoch):
                self._handle(ev.Left(device=device, epoch=epoch))
            case m.LoadProgress():
                self._progressed(device, message)
            case m.LoadDone():
                self._loaded(device, message)
            case m.LoadRefused(ticket=ticket, reason=reason, device=source):
                self._progress = self._progress.without(device)
                self._handle(ev.LoadFailed(device=device, ticket=ticket, reason=reason, source=source))
            case m.UnitsArranged(epoch=epoch):
                self._handle(ev.Arranged(device=device, epoch=epoch))
            case m.GroupFormed(epoch=epoch):
                self._handle(ev.Formed(device=device, epoch=epoch))
            case m.BlocksMoved(epoch=epoch):
                self._handle(ev.Compacted(device=device, epoch=epoch))
            case m.PlanesRestored():
                self._planes_restored(device, message)
            case m.BlocksSaved(ticket=ticket, ok=ok):
                self._keeper.saved(device, ticket, ok)
                if self.recovery.phase == SERVING:
                    self._keeper.save_sealed(self.recovery.layout, self.recovery.epoch)
            case m.HandedOver(ok=ok, reason=reason):
                self._handed_over(device, ok, reason)

    def _on_worker_end(self, process: WorkerProcess, how: str) -> None:
        device = process.device
        if device is not None and self._workers.get(device) is process:
            del self._workers[device]
            self._handing_over.discard(device)
            self._handle(ev.WorkerGone(device=device, reason=how))

    # ------------------------------------------------------------------------------------------------- recovery

    def _handle(self, event: ev.Event) -> None:
        """Feeds the coordinator and carries out what it says; answers that come at once are fed in turn."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                commands = self.recovery.handle(self._events.popleft(), time.monotonic())
                if not self.recovery.is_loading:  # asked before the next loads are ordered
                    self._progress = Progress()
                for command in commands:
                    self._perform(command)
        finally:
            self._handling = False
        self._tell_story()
        self._publish()

    def _perform(self, command: ev.Command) -> None:
        match command:
            case ev.Abort(epoch=epoch):
                if self._region is not None:
                    self._region.abort(f"epoch {epoch} is over")
                self._keeper.fault()
            case ev.Fence(device=device, reason=reason):
                process = self._workers.get(device)
                if process is None:  # the device still waits for a process
                    self._handle(ev.WorkerGone(device=device, reason=reason))
                else:
                    process.last_words = process.last_words or reason
                    process.kill()
            case ev.Leave(device=device, epoch=epoch):
                self._send(device, m.LeaveEpoch(epoch=epoch))
            case ev.TakeCensus(epoch=epoch, devices=devices):
                self._handle(ev.CensusTaken(epoch=epoch, alive=self._plane.census(devices, epoch)))
            case ev.Adopt(device=device, epoch=epoch):
                self._adopt(device)
            case ev.Attach(device=device, epoch=epoch):
                self._processes.take(device, lambda process: self._assign(process, device, epoch))
            case ev.Reserve():
                refused = self._plane.reserve(command)
                if refused is not None:
                    self._handle(ev.Reserved(epoch=command.epoch, ticket=command.ticket, refused=refused))
            case ev.Load():
                self._load(command)
            case ev.CancelLoad(device=device, ticket=ticket):
                self._send(device, m.CancelLoad(ticket=ticket))
            case ev.Arrange():
                self._arrange(command)
            case ev.Compact():
                self._keeper.compact(command, self.recovery.layout)
            case ev.Restore():
                self._keeper.restore(command)
            case ev.Form():
                self._form(command)
            case ev.Record():
                self._record = command
            case ev.Drop(device=device):
                process = self._workers.pop(device, None)
                if process is not None:
                    process.kill()
                self._handing_over.discard(device)
                self._processes.forget(device)
                self._plane.drop(device)
            case ev.Resume():
                self._resume(command)
            case ev.Refuse(reason=reason):
                self._refuse(reason)

    def _assign(self, process: WorkerProcess, device: str, epoch: int) -> None:
        process.device = device
        self._workers[device] = process
        config = self.config
        self._send(
            device,
            m.Assign(
                device=device,
                epoch=self.recovery.epoch,
                runtime_dir=config.runtime_dir,
                model_folder=config.model_folder,
                model=config.model,
                fingerprint=self._fingerprint,
                max_model_len=config.max_model_len,
                max_batch_tokens=config.max_batch_tokens,
                kv_block_size=config.kv_block_size,
                kv_blocks=config.kv_blocks,
                num_threads=config.threads_per_worker,
                collectives=config.collectives,
                packed_folder=config.packed_folder,
                graphs=config.cuda_graphs,
                attention=config.attention,
                kernels=config.kernels,
                triton=config.triton,
                strikes=tuple(strike for strike in self._strikes if strike.device == device),
            ),
        )
        if epoch != self.recovery.epoch:
            # The epoch rose while the device waited for a process, which has missed the order to leave.
            self._send(device, m.LeaveEpoch(epoch=self.recovery.epoch))

    def _load(self, command: ev.Load) -> None:
        order = m.LoadUnits(
            epoch=command.epoch,
            ticket=command.ticket,
            before=command.before.as_dict(),
            after=command.after.as_dict(),
            fresh=command.fresh,
            pieces=[_piece(move) for move in command.moves],
            sums=self._sums,
            pace=BACKGROUND_PACE if command.background else 1.0,
            kv_blocks=self._keeper.worth_moving() if command.background else [],
        )
        self._send(command.device, order)

    def _progressed(self, device: str, report: m.LoadProgress) -> None:
        """Dropped if it is of a load that was called off."""
        if not self.recovery.awaits(report.ticket):
            return
        total_bytes, now_s = report.total_bytes, time.monotonic()
        self._progress = self._progress.heard(device, report.num_bytes, total_bytes, report.links, now_s)
        if self._progress.is_worth_a_line:
            self._progress = self._progress.told()
            self._handle(ev.Progressed(progress=self._progress))
        else:
            self._publish()

    def _loaded(self, device: str, done: m.LoadDone) -> None:
        if self.recovery.awaits(done.ticket):  # through, and counted until all are
            total_bytes, now_s = done.num_bytes, time.monotonic()
            self._progress = self._progress.heard(device, total_bytes, total_bytes, done.links, now_s)
        self._sums |= done.sums
        self._handle(
            ev.Loaded(
                device=device,
                ticket=done.ticket,
                num_bytes=done.num_bytes,
                peer_bytes=done.peer_bytes,
                rerouted=tuple(done.rerouted),
                links=tuple((source, *measured) for source, measured in done.links.items()),
            )
        )

    def _arrange(self, command: ev.Arrange) -> None:
        """What the manifest says is not true while units move; whoever attached then would believe it."""
        self._plane.put_manifest(empty_shard(command.device), 0, command.epoch)
        order = m.ArrangeUnits(
            epoch=command.epoch,
            before=command.before.as_dict(),
            after=command.after.as_dict(),
            blocks=self.pool.occupied(),
        )
        self._send(command.device, order)

    def _form(self, command: ev.Form) -> None:
        try:
            if not self._plane.settle(command.layout, command.num_kv_blocks, command.epoch):
                return
        except BudgetExceeded as error:
            self._handle(ev.Reserved(epoch=command.epoch, ticket=command.ticket, refused=str(error)))
            return
        if self._region is not None:
            self._region.close()
        self._remove_stores()
        self._ranks = command.layout.devices
        self._region = ShmRegion.create(command.epoch, len(self._ranks), self.config.slot_bytes)
        shards = [(shard.device, shard.as_dict()) for shard in command.layout.shards]
        parts = self._balancer.parts(command.layout) if self._balancer is not None else {}
        for device in self._ranks:
            order = m.FormGroup(epoch=command.epoch, shards=shards, parts=parts.get(device))
            self._send(device, order, fds=(self._region.fd,))

    def _remove_stores(self) -> None:
        """Of older epochs, and of an engine that was killed: a store must not exist before its group."""
        for kind in ("gloo", "nccl"):
            for store in Path(self.config.runtime_dir).glob(f"{kind}-*"):
                store.unlink(missing_ok=True)

    def _write_record(self) -> None:
        """Manifests wait until nobody waits for the recovery any more: what they say is true in the meantime."""
        record, self._record = self._record, None
        if record is not None and record.epoch == self.recovery.epoch:
            self._plane.put_manifests(record.layout, record.num_kv_blocks, record.epoch)

    def _resume(self, command: ev.Resume) -> None:
        self._keeper.resume(command)
        self._save_while_idle()
        self._ready.set()

    def _save_while_idle(self) -> None:
        """Orders the copies that otherwise follow the next step: the mirror does not wait for somebody to speak."""
        if self.recovery.phase == SERVING and not self.scheduler.has_work():
            self._keeper.save_sealed(self.recovery.layout, self.recovery.epoch)

    def _planes_restored(self, device: str, answer: m.PlanesRestored) -> None:
        if not answer.ok:
            log.warning("%s: KV planes could not be restored: %s", device, answer.reason)
        self._handle(
            ev.Restored(
                device=device,
                epoch=answer.epoch,
                ok=answer.ok,
                copied_bytes=answer.copied_bytes,
                restored_bytes=answer.restored_bytes,
            )
        )

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self.scheduler.fail_all(reason)
        self._deliver(self.scheduler.take_failures())
        self._ready.set()

    def _rebalance_if_due(self) -> None:
        """Between two steps. Copies are a planned change; other shares alone are in force from the next step on."""
        balancer, recovery, now_s = self._balancer, self.recovery, time.monotonic()
        if balancer is None or not recovery.is_calm or not balancer.is_due(now_s):
            return
        slots = {device: self._expert_slots(device) for device in recovery.members}
        answer = balancer.decide(recovery.layout, slots, recovery.speeds, now_s)
        if not answer.is_change:
            return
        log.info("experts: %s", answer.reason)
        if not answer.stages:
            balancer.adopt(answer.placement)
            for device, parts in balancer.parts(recovery.layout).items():
                self._send(device, m.ShareExperts(epoch=recovery.epoch, parts=parts))
            return
        stage = answer.stages[0]  # the next decision goes on from there
        balancer.adopt(stage.placement)
        plan = balancer.plan(stage, recovery.layout, answer.reason)
        with self._lock:
            self._num_changes += 1
            change_id = self._num_changes
        self._handle(ev.Change(why="rebalance experts", change_id=change_id, plan=plan))

    def _prepare_for_a_loss(self, for_s: float = 0.0) -> bool:
        """Makes some memory ready for the weights that a loss would bring, once there is time for it, in all of the
        epoch once: for so many seconds, and a piece at least. False: there is nothing left to do now."""
        recovery, now_s = self.recovery, time.monotonic()
        if not recovery.is_calm:
            self._ahead = None
            return False
        if self._ahead is None or self._ahead.epoch != recovery.epoch:
            slots = slots_after_a_loss(self.units, recovery.layout, recovery.speeds)
            work = self._plane.commit_ahead(slots, recovery.epoch)
            self._ahead = _Ahead(epoch=recovery.epoch, due_s=now_s + CALM_S, work=work)
        if now_s < self._ahead.due_s:
            return False
        for pieces in self._ahead.work:
            if not recovery.is_calm:  # an anchor was found to have gone
                return False
            for device, ranges in pieces.items():
                self._send(device, m.MapPages(epoch=recovery.epoch, ranges=ranges))
            if time.monotonic() >= now_s + for_s:
                return True
        return False

    def _expert_slots(self, device: str) -> int:
        """How many expert units the device has memory for, beside all else that it holds now."""
        shard, weights = self.recovery.layout[device], self._plane.weights
        kv_bytes = self._plane.kv.room_for(len(shard[KV]), self.recovery.num_kv_blocks)
        room = self.recovery.snapshot()[device]["budget_bytes"] - kv_bytes
        least, most = len(shard[EXPERT]), self.units.num_units[EXPERT]
        fits = range(least + 1, most + 1)
        return least + bisect_right(fits, room, key=lambda n: weights.committed_bytes(shard.replaced(EXPERT, range(n))))

    def _begin_change(self, change: DeviceChange, change_id: int) -> None:
        """Starting anchors takes longer than a step, so that happens on a thread; serving goes on."""
        new = [device for device in change.add if device not in self.recovery.members]

        def start() -> None:
            problem = ""
            try:
                for device in new:
                    self._plane.ensure_anchor(device, change.memory_bytes)
            except AnchorTPError as error:
                problem = str(error)
            self._post(lambda: self._change(change, change_id, problem))

        name = f"change {change_id}"
        self._starting[name] = threading.Thread(target=start, name=f"anchortp-{name}", daemon=True)
        self._starting[name].start()

    def _change(self, change: DeviceChange, change_id: int, problem: str) -> None:
        self._starting.pop(f"change {change_id}", None)
        found: tuple[ev.DeviceFound, ...] = ()
        if self._stopping.is_set():
            for device in change.add:
                self._plane.stop_started(device)
            return
        try:
            found = tuple(self._open_device(device) for device in change.add if not problem)
        except AnchorTPError as error:
            problem = str(error)
        wishes = [f"add {device}" for device in change.add] + [f"remove {device}" for device in change.remove]
        if change.speeds is not None:
            wishes.append("speeds " + (", ".join(f"{d}={s:g}" for d, s in change.speeds) or "all 1"))
        self._handle(
            ev.Change(
                why=", ".join(wishes),
                change_id=change_id,
                add=found,
                remove=change.remove,
                speeds=change.speeds,
                problem=problem,
            )
        )

    def _open_device(self, device: str) -> ev.DeviceFound:
        if device in self.recovery.members:  # the coordinator says so
            return ev.DeviceFound(device=device, budget_bytes=0)
        return self._plane.open(device)

    def _adopt(self, device: str) -> None:
        """Starting an anchor takes longer than a step, so that happens on a thread; serving goes on."""
        if device in self._adopting or device in self._handing_over:
            return
        worker = self._workers.get(device)

        def start() -> None:
            try:
                # Where a device was lost, its worker ends at the same time, and there is nothing to adopt.
                if worker is not None and not wait_dead(worker.pid, ADOPT_AFTER_S):
                    self._plane.ensure_anchor(device)
                self._post(lambda: self._hand_over(device))
            except AnchorTPError as error:
                self._post(lambda error=error: self._handed_over(device, False, str(error)))

        self._adopting[device] = threading.Thread(target=start, name=f"anchortp-adopt-{device}", daemon=True)
        self._adopting[device].start()

    def _hand_over(self, device: str) -> None:
        self._adopting.pop(device, None)  # the thread's last words
        if device not in self._workers or device not in self.recovery.members:
            self._handed_over(device, False, "its worker is gone too")
            if device not in self.recovery.members and not self._stopping.is_set():
                self._plane.stop_started(device)  # the device was lost meanwhile
            return
        epoch = self.recovery.epoch
        try:
            self._plane.reconnect(device, epoch)
        except AnchorTPError as error:
            self._handed_over(device, False, str(error))
            return
        self._handing_over.add(device)
        self._send(device, m.HandOver(epoch=epoch, ranges=self._plane.committed_ranges(device)))

    def _handed_over(self, device: str, ok: bool, reason: str) -> None:
        self._adopting.pop(device, None)
        self._handing_over.discard(device)
        if self._stopping.is_set():
            return
        if ok:
            self._ahead = None  # it went on without this device
            shard = self.recovery.layout[device]
            self._plane.put_manifest(shard, self.recovery.num_kv_blocks, self.recovery.epoch)
        self._handle(ev.Adopted(device=device, ok=ok, reason=reason))

    def _send(self, device: str, message: Any, fds: tuple[int, ...] = ()) -> None:
        """To a worker. One that is gone or does not read is dealt with by its pidfd, or its deadline."""
        process = self._workers.get(device)
        if process is not None:
            with contextlib.suppress(WireError):
                process.channel.post(message, fds)

    # ---------------------------------------------------------------------------------------------- reporting

    def _tell_story(self) -> None:
        """New lines of the story go to the log as they come."""
        lines = [line for episode in self.recovery.episodes for line in episode.lines]
        for line in lines[self._story_lines :]:
            log.info("epoch %d, %s: %s", line.epoch, line.phase, line.text)
        self._story_lines = len(lines)

    def _publish_if_due(self) -> None:
        if time.monotonic() >= self._publish_due_s:
            self._publish()

    def _publish(self, state: str | None = None) -> None:
        """Replaces the snapshot that `status` returns; other threads read it without a lock."""
        recovery = self.recovery
        self._publish_due_s = time.monotonic() + PUBLISH_EVERY_S
        names = {SERVING: "serving", REFUSING: "refusing", IDLE: "starting"}
        if state is None:
            before_first = len(recovery.episodes) == 1 and recovery.episodes[0].ended_s is None
            state = names.get(recovery.phase, "starting" if before_first else "recovering")
        episodes = [self._episode(i) for i in range(len(recovery.episodes))[-MAX_EPISODES_SHOWN:]]
        faults = [episode for episode in episodes if episode["cause"] != "start" and not episode["change_id"]]
        calm = self._balancer is not None and recovery.phase == SERVING
        experts = self._balancer.status(recovery.layout) if calm else {}
        self._status = {
            "state": state,
            "epoch": recovery.epoch,
            "phase": recovery.phase,
            "reason": self._refusal,
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting,
            "num_preempted": self.scheduler.num_preempted,
            "num_spares": self._processes.num_spares_ready if hasattr(self, "_processes") else 0,
            "num_faults": recovery.num_faults,
            "kv": {
                "blocks": recovery.num_kv_blocks,
                "blocks_held": self.pool.num_held,
                "blocks_cached": self.pool.num_cached,
                "blocks_evicted": self.pool.num_evicted_blocks,
                "queried_tokens": self.pool.num_queried_tokens,
                "hit_tokens": self.pool.num_hit_tokens,
                "replayed_tokens": self.scheduler.num_replayed_tokens,
                "recomputed_tokens": self.scheduler.num_recomputed_tokens,
                **(self._keeper.counts() if self._keeper is not None else {}),
            },
            "counters": dict(self._counters),
            "devices": self._devices(experts.pop("device_load", {})),
            **self._progress.as_dict(),
            "links": {f"{a}>{b}": {"bytes_per_s": rate} for (a, b), rate in recovery.rates.measured.items()},
            "expert_load": experts.pop("expert_load", {}),
            "experts": experts,
            "episodes": episodes,
            "faults": faults,
            "changes": [episode for episode in episodes if episode["change_id"]],
        }

    def _devices(self, expert_load: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        devices = self.recovery.snapshot()
        for name, device in devices.items():
            if name in expert_load:
                device["expert_load"] = expert_load[name]
            process = self._workers.get(name)
            device["worker_pid"] = process.pid if process is not None else 0
            load = self._progress.devices.get(name)
            device["loading_bytes"] = load.num_bytes if load is not None else 0
            device["loading_total_bytes"] = load.total_bytes if load is not None else 0
            device["ready_bytes"] = self._plane.ready_bytes(name)
        return devices

    def _episode(self, index: int) -> dict[str, Any]:
        episode = self.recovery.episodes[index]
        first = self._first_tokens.get(index)
        return episode.as_dict() | {
            "first_token_s": None if first is None else first - episode.began_s,
        }


def _piece(move: Move) -> m.LoadPiece:
    peer = move.source if isinstance(move.source, FromPeer) else None
    return m.LoadPiece(
        family=move.family,
        unit=move.unit,
        slot=move.slot,
        num_units=move.num_units,
        first_byte=move.first_byte,
        num_bytes=move.num_bytes,
        source=peer.device if peer else "",
        source_slot=peer.slot if peer else 0,
    )


def _expert_balancer(config: EngineConfig, units: ModelUnits) -> ExpertBalancer | None:
    moe = config.model.moe
    if not config.eplb or moe is None or moe.cut != "experts":
        return None
    from anchortp.engine.balancer import ExpertBalancer  # it imports numpy, which nothing else here needs

    return ExpertBalancer(units, config.eplb_interval_s, config.eplb_replica_choices)


def _recovery_config(config: EngineConfig) -> RecoveryConfig:
    return RecoveryConfig(
        kv_block_size=config.kv_block_size,
        kv_blocks=config.kv_blocks,
        min_kv_blocks=config.min_kv_blocks,
        speeds=dict(config.speeds) or None,
        kv_mirror=config.kv_mirror_slots > 0,
        policy=config.plan_policy,
        pipelined=config.pipelined_load,
    )


def _failed(request_id: str, error: str) -> TokenOutput:
    return TokenOutput(request_id=request_id, tokens=(), finish_reason="error", error=error)
