"""Talk to a trained run, several turns, typed or piped in: `step-megatron chat --run RUN --audio FILE [--text TEXT]`.

A line is a turn. `/audio FILE` adds a clip to the next turn, `/new` forgets the conversation, `/help` lists the commands, `/quit`
(or the end of the input) ends. What the model thinks and what it answers are shown apart.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from step_megatron.audio.errors import AudioError
from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.evaluation.scoring import split_reply

HELP = "commands: /audio FILE   add a clip to the next turn;   /new   start again;   /quit   end.   Anything else is your turn."


class Speaker(Protocol):
    """What answers (`load.TrainedRun`)."""

    def add_file(self, path: Path) -> str:
        """Encode an audio file; returns its address."""

    def reply(
        self, conversations: Sequence[Conversation], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[str | None]:
        """Text of the next assistant turn, from inside `<think>` on."""


class Chat:
    """A conversation in progress.

    Args:
        speaker: the model.
        write: where a line of output goes.
        temperature: 0 is greedy.
    """

    def __init__(
        self,
        speaker: Speaker,
        write: Callable[[str], None] = print,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        self.speaker, self.write = speaker, write
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.turns: list[Turn] = []
        self.clips: list[str] = []

    def add_audio(self, path: Path) -> None:
        """Add a clip to the next turn.

        Raises:
            ValueError: the file is missing or not usable audio.
        """
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self.clips.append(self.speaker.add_file(path))
        except AudioError as error:
            raise ValueError(f"{path}: {error}") from error

    def say(self, text: str) -> None:
        """Send the clips added so far with a text, and show the reply; an empty text is right when there is a clip.

        Raises:
            ValueError: the conversation has outgrown the model's positions; it then stays as it was before this turn.
        """
        content = (*map(Audio, self.clips), *([Text(text)] if text else []))
        turns = [*self.turns, Turn("human", content)]
        conversation = Conversation("chat", "chat", tuple(turns))
        generated = self.speaker.reply([conversation], self.max_new_tokens, self.temperature, self.seed + len(turns))[0]
        reply = split_reply(generated)
        if reply.reasoning:
            self.write(f"  thinks: {reply.reasoning}")
        self.write(f"model: {reply.answer or '(no answer: it was still thinking at the longest reply allowed)'}")
        self.turns = [*turns, Turn("assistant", (Text(reply.answer or ""),), reasoning=reply.reasoning)]
        self.clips = []

    def command(self, line: str) -> bool:
        """Do what a line asks: a command, or a turn. Returns False when the chat is over; what goes wrong is said, not raised."""
        name, _, argument = line.strip().partition(" ")
        try:
            if name in ("/quit", "/exit"):
                return False
            if name == "/new":
                self.turns, self.clips = [], []
                self.write("(a new conversation)")
            elif name == "/audio":
                self.add_audio(Path(argument.strip()).expanduser())
                self.write(f"(clip {len(self.clips)} of your next turn: {argument.strip()})")
            elif name.startswith("/"):
                self.write(HELP)
            elif line.strip() or self.clips:
                self.say(line.strip())
        except ValueError as error:
            self.write(f"error: {error}")
        return True


def chat(
    run_dir: Path,
    audio: Sequence[Path] = (),
    text: str | None = None,
    lines: Iterator[str] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> None:
    """Load a run and talk to it until the input ends.

    Args:
        audio: clips of the first turn.
        text: text of the first turn; without it the first line of the input is.
        lines: the input; standard input when None, with a prompt on a terminal.

    Raises:
        FileNotFoundError, ValueError: no run, no checkpoint, or a clip of the first turn that cannot be used.
    """
    # Before the seconds of loading: a mistyped name should not cost them.
    for path in audio:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    from step_megatron.evaluation.load import loaded_run

    with loaded_run(run_dir) as speaker:
        session = Chat(speaker, max_new_tokens=max_new_tokens, temperature=temperature)
        for path in audio:
            session.add_audio(path)
        if text is not None:
            session.say(text)
        for line in _typed() if lines is None else lines:
            if not session.command(line):
                return
        if session.clips:
            # A clip was given and never asked about: let the model say what it makes of it.
            session.say("")


def _typed() -> Iterator[str]:
    """Lines of standard input; a terminal gets a prompt and may go on after Ctrl-C."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"you: {line.rstrip()}")
            yield line
        return
    print(HELP)
    while True:
        try:
            yield input("you: ")
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
        except EOFError:
            print()
            return
