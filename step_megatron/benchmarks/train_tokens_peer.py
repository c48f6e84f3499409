"""The peer of the training benchmark: transformers' `Trainer` on a decoder with the weights of ours, padded or packed."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from step_megatron.benchmarks.clock import Clock
from step_megatron.benchmarks.train_step_peer import decoder_weights, text_config
from step_megatron.config.schema import Config
from step_megatron.model.audio_lm import AudioLanguageModel

BATCH = 8
_IGNORED = -100
# Logits of a conversation alone and of the same one in a packed row; those of rows that see one another differ by more than 1.
_APART = 1e-3


@dataclass(frozen=True)
class Conversation:
    """A prompt, and a reply that is trained."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.reply


class Pass(NamedTuple):
    """One update: the mean loss of a trained token before it, its time, and what all threads of the process computed in it."""

    loss: float
    seconds: float
    cpu_seconds: float


class TrainerPeer:
    """One update of the Trainer at a time, over all conversations.

    Args:
        config: of ours; learning rate, decay and clipping are taken from it.
        model: ours, in one process, whose weights the peer starts from.
        packed: the conversations of a batch in one row, else padded to the longest of the batch. Gradients add up over batches.

    Raises:
        RuntimeError: conversations of the packed row see one another.
    """

    def __init__(self, config: Config, model: AudioLanguageModel, conversations: Sequence[Conversation], packed: bool):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        text = text_config(config)
        # Else position_ids do not keep packed conversations apart: then transformers builds a plain causal mask.
        text.use_cache = False
        self.model = transformers.AutoModelForCausalLM.from_config(text, attn_implementation="sdpa", dtype=torch.float32)
        missing, unexpected = self.model.load_state_dict(decoder_weights(model), strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"weights that do not fit the peer: {missing} {unexpected}")
        self.model.tie_weights()
        batches = [conversations[start : start + BATCH] for start in range(0, len(conversations), BATCH)]
        rows = [_packed(batch) for batch in batches] if packed else [_row(each) for each in conversations]
        if packed:
            _check_apart(self.model, rows[0], batches[0])
        self._timer = _timer()
        self.trainer = transformers.Trainer(
            model=self.model,
            args=_arguments(config, 1 if packed else BATCH, len(batches)),
            train_dataset=rows,
            data_collator=_collate,
            callbacks=[self._timer],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)

    def update(self) -> Pass:
        """One update."""
        loss = self.trainer.train().training_loss
        return Pass(loss, *self._timer.seconds)


def _arguments(config: Config, rows: int, batches: int):
    from transformers import TrainingArguments

    optimizer = config.megatron.optimizer
    return TrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=batches,
        # In the order given: every contestant trains on all conversations anyway.
        train_sampling_strategy="sequential",
        optim="adamw_torch_fused",
        learning_rate=optimizer["lr"],
        lr_scheduler_type="constant",
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["clip_grad"],
        remove_unused_columns=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def _timer():
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        """From the beginning to the end of the latest step."""

        def on_step_begin(self, args, state, control, **kwargs):
            self.clock = Clock()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds = self.clock.read()

    return Timer()


def _row(conversation: Conversation) -> dict[str, list[int]]:
    labels = [_IGNORED] * len(conversation.prompt) + list(conversation.reply)
    return {"input_ids": list(conversation.tokens), "labels": labels}


def _packed(conversations: Sequence[Conversation]) -> dict[str, list[int]]:
    """One row; positions that begin anew tell transformers where a conversation begins."""
    rows = [_row(each) for each in conversations]
    packed = {name: [item for row in rows for item in row[name]] for name in ("input_ids", "labels")}
    return packed | {"position_ids": [position for each in conversations for position in range(len(each.tokens))]}


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right; a row alone needs no attention mask."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": _IGNORED}
    batch = {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows]) for name, value in fill.items()
    }
    if len(rows) == 1:
        return batch | {name: torch.tensor([rows[0][name]]) for name in rows[0].keys() - fill.keys()}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def _check_apart(model: torch.nn.Module, row: dict[str, list[int]], conversations: Sequence[Conversation]) -> None:
    """Compare logits, which show cross-talk where a loss hides it."""
    batch = _collate([row])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        parts = together.split([len(each.tokens) for each in conversations])
        alone = (model(input_ids=torch.tensor([each.tokens])).logits[0] for each in conversations)
        distance = max((part - one).abs().max().item() for part, one in zip(parts, alone, strict=True))
    if distance > _APART:
        raise RuntimeError(f"the peer's packed conversations see one another: logits differ by {distance:.3g} from those alone")
