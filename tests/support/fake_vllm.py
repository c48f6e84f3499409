"""A stand-in for vLLM with the shapes of its public interface (0.25 to 0.33): it computes with transformers what vLLM would.

One token a step of every request, by the weights that it has read from the folder: what is exported, embedded, sampled and told
is real, the engine is not. `calls` records what was done to it besides generating.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch


@dataclass
class EngineArgs:
    model: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prompt_embeds: bool = False
    enable_prefix_caching: bool | None = None
    enable_sleep_mode: bool = False
    logprobs_mode: str = "raw_logprobs"


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class CompletionOutput:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool = False


class LLMEngine:
    """As `vllm.LLMEngine`. `fault`, a function of logits, is for tests of the gate."""

    fault = staticmethod(lambda logits: logits)

    def __init__(self, args: EngineArgs):
        self.args, self.calls, self._requests = args, [], {}
        assert args.skip_tokenizer_init and args.enable_prompt_embeds and args.enable_sleep_mode
        self._read()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        return cls(engine_args)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        assert request_id not in self._requests and prompt.keys() <= {"prompt_token_ids", "prompt_embeds"} and len(prompt) == 1
        if "prompt_embeds" in prompt:
            embeddings = prompt["prompt_embeds"]
        else:
            embeddings = self._model.get_input_embeddings()(torch.tensor(prompt["prompt_token_ids"]))
        assert embeddings.dim() == 2 and len(embeddings) + params.max_tokens <= self.args.max_model_len
        generator = torch.Generator().manual_seed(params.seed)
        self._requests[request_id] = SimpleNamespace(
            inputs=embeddings, params=params, generator=generator, output=RequestOutput(request_id, [CompletionOutput()])
        )

    def step(self) -> list[RequestOutput]:
        running = list(self._requests.values())[: self.args.max_num_seqs]
        for request in running:
            self._decode(request)
            if request.output.finished:
                del self._requests[request.output.request_id]
        return [request.output for request in running]

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def abort_request(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")
        if level == 2:
            self._model = None

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {tags}")

    def collective_rpc(self, method: str) -> None:
        self.calls.append(method)
        assert method == "reload_weights"
        self._read()

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def _read(self) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=getattr(torch, self.args.dtype)).eval()

    @torch.no_grad()
    def _decode(self, request: SimpleNamespace) -> None:
        params, completion = request.params, request.output.outputs[0]
        logits = self.fault(self._model(inputs_embeds=request.inputs[None], use_cache=False).logits[0, -1].float())
        scaled = logits / params.temperature if params.temperature and self.args.logprobs_mode == "processed_logprobs" else logits
        logprobs = scaled.log_softmax(-1)
        if params.temperature:
            token = int((logits / params.temperature).softmax(-1).multinomial(1, generator=request.generator))
        else:
            token = int(logits.argmax())
        completion.token_ids.append(token)
        completion.logprobs.append({token: SimpleNamespace(logprob=float(logprobs[token]), rank=1)})
        request.inputs = torch.cat([request.inputs, self._model.get_input_embeddings().weight[token][None]])
        if token in params.stop_token_ids:
            completion.finish_reason = "stop"
        elif len(completion.token_ids) >= params.max_tokens:
            completion.finish_reason = "length"
        request.output.finished = completion.finish_reason is not None
