"""The one thread that owns model and engine. Requests come in by a queue; each hears of its samples as they grow."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.generation.sequence import Group


@dataclass(frozen=True)
class Progress:
    """What a request hears after a step.

    Attributes:
        prompt_tokens: of the prompt.
        tokens: of every sample so far.
        reasons: why each has ended; None for one that goes on.
    """

    prompt_tokens: int
    tokens: list[list[int]]
    reasons: list[str | None]

    @property
    def done(self) -> bool:
        return None not in self.reasons


@dataclass(eq=False)
class Ticket:
    """A request on its way; iterate over it to hear of it."""

    prepare: Callable[[], Prompt]
    samplings: list[Sampling]
    group: Group | None = None
    abandoned: bool = False
    _heard: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[Progress]:
        """Raises what kept the request from being answered."""
        while True:
            said = self._heard.get()
            if isinstance(said, BaseException):
                raise said
            yield said
            if said.done:
                return

    def tell(self, what: Progress | BaseException) -> None:
        """Called by the worker."""
        self._heard.put(what)

    def progress(self) -> Progress:
        """Where its samples stand; called by the worker."""
        members = self.group.members
        return Progress(
            len(self.group.prompt.tokens),
            [list(member.result.tokens) for member in members],
            [member.result.finish_reason if member.done else None for member in members],
        )


class Worker:
    """Runs the engine in a thread of its own, for as long as it is entered.

    Args:
        engine: nobody else uses it, nor its model, meanwhile.
        threads: compute threads; torch's count belongs to the thread that sets it.
    """

    def __init__(self, engine: Engine, threads: int):
        self._engine, self._threads = engine, threads
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._live: list[Ticket] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._inbox.put(None)
        self._thread.join()

    def submit(self, prepare: Callable[[], Prompt], samplings: list[Sampling]) -> Ticket:
        """Queue a request; `prepare` makes its prompt, in the engine's thread."""
        ticket = Ticket(prepare, samplings)
        self._inbox.put(ticket)
        return ticket

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        failure: BaseException = RuntimeError("the server is shutting down")
        try:
            with self._engine.running():
                while self._take():
                    self._step()
        except BaseException as error:  # whoever waits for an answer has to hear of it
            failure = error
        for ticket in self._live:
            self._engine.cancel(ticket.group)
            ticket.tell(failure)
        while True:
            if (ticket := self._inbox.get()) is None:
                return
            ticket.tell(failure)

    def _take(self) -> bool:
        """Start what has come, waiting for something where nothing is under way; False when it is over."""
        while not self._live or not self._inbox.empty():
            ticket = self._inbox.get()
            if ticket is None:
                # For the loop that turns late requests away.
                self._inbox.put(None)
                return False
            try:
                ticket.group = self._engine.add(ticket.prepare(), ticket.samplings)
                self._live.append(ticket)
            except Exception as error:  # this request's alone
                ticket.tell(error)
        return True

    def _step(self) -> None:
        for ticket in [each for each in self._live if each.abandoned]:
            self._engine.cancel(ticket.group)
            self._live.remove(ticket)
        if not self._live:
            return
        self._engine.step()
        for ticket in list(self._live):
            progress = ticket.progress()
            ticket.tell(progress)
            if progress.done:
                self._live.remove(ticket)
