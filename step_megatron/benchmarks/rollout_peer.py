"""The peers of the rollout benchmark: transformers with the weights of ours, by `generate` and by continuous batching."""

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Work = Callable[[], list[list[int]]]
# Seconds after which a call of `generate_batch` is taken for one that never answers.
LIMIT = 120
# Its own choice is six tenths of the machine's memory in pages of 256 tokens, which takes minutes on a CPU; of what fits these
# prompts (64 x 128, 16 x 512, 256 x 32; 128 to 2,560 tokens a batch) this was the fastest.
_PAGE, _PAGES, _BATCH_TOKENS = 64, 128, 512


def load(folder: Path) -> torch.nn.Module:
    """The decoder that `conversion.live.write_decoder` has written, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # What it reads for an absent file: replies have no end but their length.
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    return model


def generate(model: torch.nn.Module, prompts: Sequence[Sequence[int]], new: int, sample: bool = False) -> Work:
    """`generate` on all prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens in prompts])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])
    settings = {"max_new_tokens": new, "do_sample": sample, "eos_token_id": None, "pad_token_id": 0}
    if sample:
        settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return lambda: model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()


class ContinuousBatching:
    """`generate_batch` in a process of its own: it may never answer, and a process can be ended.

    Args:
        folder: of the decoder.
        prompts, new: what is asked at every call.
        limit: seconds that a call may take; the first one also starts the process.
        serve, context: for tests: what the process runs, and how it is started.

    Raises:
        TimeoutError: from a call that took longer; the process is ended.
        RuntimeError: from a call that failed in the process.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Sequence[int]],
        new: int,
        limit: float = LIMIT,
        serve: Callable[..., None] | None = None,
        context: str = "spawn",
    ):
        start = multiprocessing.get_context(context)
        self.limit = limit
        self._connection, theirs = start.Pipe()
        arguments = theirs, folder, [list(tokens) for tokens in prompts], new, torch.get_num_threads()
        self._process = start.Process(target=serve or _serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self) -> list[list[int]]:
        """Replies in the order of the prompts."""
        try:
            self._connection.send("go")
            replies = self._connection.recv() if self._connection.poll(self.limit) else None
        except (EOFError, OSError):
            raise RuntimeError("its process ended without a result") from None
        if replies is None:
            self.close()
            raise TimeoutError(f"no result within {self.limit:g} s")
        if isinstance(replies, str):
            raise RuntimeError(replies)
        return replies

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, folder: Path, prompts: list[list[int]], new: int, threads: int) -> None:
    """Answer every message with replies, or with what went wrong."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    model = load(folder)
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(page_size=_PAGE, num_blocks=_PAGES, max_batch_tokens=_BATCH_TOKENS)
    with suppress(EOFError):
        while connection.recv():
            try:
                outputs = model.generate_batch(
                    inputs=prompts, generation_config=settings, continuous_batching_config=batching, progress_bar=False
                )
                by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
                connection.send([by_prompt[tuple(tokens)] for tokens in prompts])
            except Exception as error:
                # Transformers' own, of any kind: the caller reports a contestant that cannot take part, and the others go on.
                connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
