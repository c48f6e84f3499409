"""vLLM behind the interface of `Engine`: prompts in, samples with log-probabilities out, weights from the trainer.

    rl.rollout: {backend: vllm}         pip install 'step-megatron[vllm]'

vLLM has weights of its own, so after each update the decoder is written out in Hugging Face's layout and read in again; prompts
with audio go in as embeddings, which the trainer's own embedding and adaptor make. Before its samples train a policy, and again
after a resume, the first prompts pass a gate (`parity.py`): where engine and trainer differ about the same tokens by more than
`rl.rollout.vllm.parity_limit`, the run stops.

Written for vLLM's documented interfaces and tested with a stand-in that has them. **Not run against vLLM.**
"""

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.conversion.live import write_decoder
from step_megatron.generation.interface import RolloutEngine
from step_megatron.generation.layout import check_layout, generation_mode
from step_megatron.generation.parity import check_parity
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.model.batch import make_batch
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)
# Prompts of the gate, and tokens of each.
_GATE_PROMPTS, _GATE_TOKENS = 8, 16


@dataclass(eq=False)
class Request:
    """One sample; `done` once it has ended, with its `result` filled."""

    prompt: Prompt
    sampling: Sampling
    result: Generation
    name: str = ""
    done: bool = False


@dataclass(eq=False)
class Group:
    """The samples of one prompt."""

    members: list[Request] = field(default_factory=list)


class VLLMEngine(RolloutEngine):
    """Generates with vLLM.

    Args:
        model: the trainer's, not wrapped, on one pipeline stage.
        config: the run's; `generation.rows` and `max_length` bound vLLM's batches, `rl.rollout.vllm` is its own.
        for_policy: samples train a policy: the gate is passed first, and what cuts the distribution off is refused.

    Attributes:
        parity: max |dlogp| that the gate found; None before it.

    Raises:
        ConfigError: vLLM is not installed, or the layout is none that it runs in.
    """

    def __init__(self, model: AudioLanguageModel, config: Config, *, for_policy: bool = False):
        check_layout(model)
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"rl.rollout.backend=vllm: vLLM cannot be imported ({error}); run: pip install 'step-megatron[vllm]', or set "
                "rl.rollout.backend=own"
            ) from error
        tensor_parallel = model.config.tensor_model_parallel_size
        if tensor_parallel > 1 and dist.get_world_size() > tensor_parallel:
            raise ConfigError(
                f"rl.rollout.backend=vllm: tensor_model_parallel_size={tensor_parallel} with several replicas is not supported; "
                "set it to 1, or use rl.rollout.backend=own"
            )
        self.model, self.config, self.for_policy = model, config, for_policy
        self.parity: float | None = None
        self._vllm, self._engine = vllm, None
        self._folder = tempfile.TemporaryDirectory(prefix="step_megatron_vllm_")
        self._path = self._folder.name
        if tensor_parallel > 1:
            # The ranks read what one of them writes.
            shared = [self._path]
            dist.broadcast_object_list(shared, src=0)
            (self._path,) = shared
        self._stale, self._asleep = True, False
        self._names = itertools.count()
        self._waiting: list[Request] = []
        self._running: dict[str, Request] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._waiting or self._running)

    @property
    def cache_bytes(self) -> int:
        """Nothing that could be counted: vLLM's memory is its own."""
        return 0

    def weights_changed(self) -> None:
        """As `RolloutEngine.weights_changed`; vLLM reads them before it goes on."""
        super().weights_changed()
        self._stale = True

    def release_cache(self) -> None:
        """Give vLLM's memory back, its weights too; they are read anew when it is next needed.

        Raises:
            RuntimeError: samples are on their way.
        """
        self._refuse_if_busy("the cache is in use")
        if self._engine is not None and not self._asleep:
            self._engine.sleep(level=2)
            self._asleep = self._stale = True

    def cancel(self, group: Group) -> None:
        """End the samples of a prompt that have not ended."""
        for request in group.members:
            if not request.done:
                request.result.finish_reason, request.done = "cancelled", True
                if request in self._waiting:
                    self._waiting.remove(request)
                else:
                    self._engine.abort_request([request.name])
                    del self._running[request.name]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where `step` may be called; vLLM has the model's weights inside, and has passed the gate."""
        with torch.inference_mode(), generation_mode(self.model):
            self._bring_up()
            if self.for_policy and self.parity is None and self._waiting:
                self._pass_gate()
            yield

    def step(self) -> int:
        """One step of vLLM; the number of samples that ended."""
        for request in self._waiting:
            request.name = str(next(self._names))
            self._running[request.name] = request
            self._engine.add_request(request.name, self._prompt(request.prompt), self._params(request.sampling))
        self._waiting = []
        ended = 0
        for output in self._engine.step():
            if output.finished and output.request_id in self._running:
                _take(self._running.pop(output.request_id), output.outputs[0])
                ended += 1
        return ended

    def _bring_up(self) -> None:
        """An engine that is awake and has the model's weights."""
        if not self._stale:
            return
        write_decoder(Path(self._path), self.model, self.config)
        if self._engine is None:
            self._engine = self._vllm.LLMEngine.from_engine_args(self._vllm.EngineArgs(**self._arguments()))
        else:
            # Weights before the cache, or both generations of weights and the cache would be there at once.
            if self._asleep:
                self._engine.wake_up(tags=["weights"])
            self._engine.collective_rpc("reload_weights")
            if self._asleep:
                self._engine.wake_up(tags=["kv_cache"])
            # What it has kept of prompts was computed by the old weights.
            self._engine.reset_prefix_cache()
        self._stale = self._asleep = False

    def _arguments(self) -> dict[str, Any]:
        generation, tensor_parallel = self.config.generation, self.model.config.tensor_model_parallel_size
        return {
            "model": self._path,
            "skip_tokenizer_init": True,
            "dtype": str(self.model.config.params_dtype).removeprefix("torch."),
            "tensor_parallel_size": tensor_parallel,
            # The trainer's processes are vLLM's workers.
            "distributed_executor_backend": "external_launcher" if tensor_parallel > 1 else None,
            "max_model_len": generation.max_length or self.config.model.max_positions,
            "max_num_seqs": generation.rows,
            "gpu_memory_utilization": self.config.rl.rollout.vllm.memory_share,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "enable_sleep_mode": True,
            # At the sampling temperature: those of the policy. Its default is before it.
            "logprobs_mode": "processed_logprobs",
        }

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Token ids, or with audio the embeddings that the trainer's own first stage makes."""
        tokens = [int(token) for token in prompt.tokens]
        if prompt.audio_features is None:
            return {"prompt_token_ids": tokens}
        device = self.model.rotary.cos.device
        batch = make_batch(
            torch.tensor([tokens], device=device),
            [len(tokens)],
            None,
            prompt.audio_features.to(device),
            prompt.encoder_frames,
            torch.tensor([int(place) for place in prompt.audio_positions], device=device),
        )
        return {"prompt_embeds": self.model.embed(batch).squeeze(1)}

    def _params(self, sampling: Sampling) -> Any:
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            # Of the token that was drawn, and no other.
            logprobs=0,
            detokenize=False,
        )

    def _queue(self, prompt: Prompt, samplings: Sequence[Sampling]) -> Group:
        group = Group([Request(prompt, sampling, Generation(weight_version=self.weight_version)) for sampling in samplings])
        self._waiting += group.members
        return group

    def _check(self, prompt: Prompt, samplings: Sequence[Sampling], name: str) -> None:
        """Refuse what vLLM, or the training of a policy, does not take."""
        for sampling in samplings:
            self._check_one(prompt, sampling, name)

    def _check_one(self, prompt: Prompt, sampling: Sampling, name: str) -> None:
        longest = self.config.generation.max_length or self.config.model.max_positions
        if len(prompt.tokens) + sampling.max_new_tokens > longest:
            raise ValueError(
                f"{name} has {len(prompt.tokens)} tokens; with max_new_tokens={sampling.max_new_tokens} it can outgrow "
                f"generation.max_length={longest}: shorten it, or allow fewer new tokens"
            )
        if sampling.budget is not None:
            raise ValueError(f"{name}: vLLM has no reasoning budget; leave it out, or set rl.rollout.backend=own")
        cut = sampling.top_p < 1 or sampling.top_k or sampling.repetition_penalty != 1
        if self.for_policy and cut:
            raise ValueError(
                f"{name}: vLLM's log-probabilities are of what top_p, top_k and repetition_penalty leave, and not of the policy; "
                "set top_p=1, top_k=0, repetition_penalty=1, or rl.rollout.backend=own"
            )

    def _pass_gate(self) -> None:
        """Generate a little to some of the prompts that wait, and hold it against the trainer."""
        waiting, self._waiting = self._waiting, []
        prompts = list({id(request.prompt): request.prompt for request in waiting}.values())
        # Audio first: that is where an engine's inputs go wrong.
        prompts = sorted(prompts, key=lambda prompt: prompt.audio_features is None)[:_GATE_PROMPTS]
        sampling = waiting[0].sampling
        short = replace(sampling, max_new_tokens=min(_GATE_TOKENS, sampling.max_new_tokens), min_new_tokens=0)
        members = [self.add(prompt, [short], f"prompt {number}").members[0] for number, prompt in enumerate(prompts)]
        while not self.idle:
            self.step()
        limit = self.config.rl.rollout.vllm.parity_limit
        self.parity = check_parity(self.model, prompts, [each.result for each in members], sampling.temperature, limit)
        logger.info(
            "vLLM and the trainer differ by at most %.3g about %d prompts (allowed: %g)", self.parity, len(prompts), limit
        )
        self._waiting = waiting


def _take(request: Request, completion: Any) -> None:
    """Bring what vLLM says of a sample into our form."""
    result = request.result
    result.tokens = [int(token) for token in completion.token_ids]
    result.logprobs = [float(said[token].logprob) for token, said in zip(result.tokens, completion.logprobs, strict=True)]
    result.finish_reason = {"stop": "stop", "length": "length"}.get(completion.finish_reason, "cancelled")
    request.done = True
