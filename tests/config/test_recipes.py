"""The recipes of `examples/recipes` for many GPUs: every setting exists, layouts fit the model, estimated memory an H100."""

import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from step_megatron.config import load_config
from step_megatron.data.micro_batch import Padding
from step_megatron.model.audio_lm import build_model
from step_megatron.model.decoder import transformer_config
from step_megatron.model.freeze import freeze
from step_megatron.runtime import megatron_cpu, megatron_release
from step_megatron.training.optimizer import build_ddp_config, build_optimizer_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(path.name for path in (EXAMPLES / "recipes").glob("*-32b-*.yaml"))
GPUS, NODE = 64, 8
# Of 80 GB, what CUDA, NCCL and fragmentation leave.
USABLE = 68 * 2**30
ENCODER = 2 * 637_000_000


class Cluster:
    """Megatron's parallel state of one rank of a cluster that is not there: groups whose messages go nowhere."""

    def __init__(self, transformer, rank: int):
        self.transformer, self.rank = transformer, rank

    def __enter__(self) -> None:
        from megatron.core import parallel_state
        from torch.testing._internal.distributed.fake_pg import FakeStore

        megatron_cpu.install()
        dist.init_process_group("fake", rank=self.rank, world_size=GPUS, store=FakeStore())
        parallel_state.initialize_model_parallel(
            self.transformer.tensor_model_parallel_size,
            self.transformer.pipeline_model_parallel_size,
            context_parallel_size=self.transformer.context_parallel_size,
            create_gloo_process_groups=False,
        )

    def __exit__(self, *exception) -> None:
        dist.destroy_process_group()
        megatron_release.reset_globals()
        megatron_cpu.uninstall()


def parameters(config, transformer, rank: int) -> tuple[int, int, int]:
    """All and trained parameters of a rank's stage, and its layers."""
    with Cluster(transformer, rank), torch.device("meta"):
        chunks = build_model(config, transformer)
        # Every stage has parameters that a pattern of the decoder matches.
        freeze(chunks, config.model.freeze)
        sizes = [(p.numel(), p.requires_grad) for chunk in chunks for p in chunk.parameters()]
        layers = sum(len(chunk.language_model.decoder.layers) for chunk in chunks)
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained), layers


def activations(transformer, tokens: int, layers: int, stages_after: int) -> int:
    """Bytes that a stage keeps between forward and backward, with attention that keeps no scores.

    A layer keeps, of each token, the inputs of its norms and products, query, key, value and attention's output and, if it is not
    recomputed, three times the feed-forward width; everything is shared out over the tensor-parallel ranks. One layer in the
    making is not recomputed yet.
    """
    width, inner = transformer.hidden_size, transformer.ffn_hidden_size
    attention = 6 * width + 2 * transformer.num_query_groups * transformer.kv_channels
    kept = attention if transformer.recompute_modules == ["mlp"] else attention + 3 * inner
    share = 2 * tokens // (transformer.tensor_model_parallel_size * transformer.context_parallel_size)
    return share * (kept * layers * (stages_after + 1) + 3 * inner)


def test_a_phase_of_ppo_fits_two_nodes():
    """The largest phase trains one model: weights, fp32 gradients, and an optimizer shared out over two replicas."""
    from step_megatron.rl.kl import KLController
    from step_megatron.rl.rewards import Rewards

    config = load_config(EXAMPLES / "recipes" / "ppo-32b.yaml")
    Rewards(config.rl.rewards), KLController(config.rl.ppo.kl)
    transformer = transformer_config(config)
    build_optimizer_config(config.megatron, transformer)
    every, _, layers = parameters(config, transformer, 0)
    budget = config.data.tokens_per_micro_batch
    assert config.generation.max_length <= budget
    training = every * (2 + 4 + 12 // 2) + activations(transformer, budget, layers, 0)
    cache = 2 * 2 * config.generation.cache_tokens * transformer.kv_channels * layers  # one query group a rank, bf16
    generating = 2 * every + cache
    assert max(training, generating) + ENCODER < USABLE


def test_the_quickstart_asks_its_judge_in_ppo_as_it_was_trained_and_measured():
    from step_megatron.rl.rewards import Rewards

    stages = ("", "-sft", "-reward", "-ppo")
    *_, reward, ppo = (load_config(EXAMPLES / f"recipes/quickstart{stage}.yaml", ["model.preset=tiny"]) for stage in stages)
    assert reward.rl.judge == ppo.rl.judge and ppo.rl.judge.instructions == "brief"
    Rewards(ppo.rl.rewards)
    # Who says how good the policy became must not have been trained against.
    assert all(each.weight == 0 for each in ppo.rl.rewards if each.kind == "verifiable")


def test_there_is_a_recipe_for_each_stage_and_length():
    assert RECIPES == sorted(f"{stage}-32b-{length}k.yaml" for stage in ("midtrain", "sft") for length in (8, 16, 32))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_the_model_and_the_machine(name):
    config = load_config(EXAMPLES / "recipes" / name)
    transformer = transformer_config(config)
    optimizer, _ = build_optimizer_config(config.megatron, transformer), build_ddp_config(config.megatron)
    tp, pp, cp = (getattr(transformer, f"{kind}_parallel_size") for kind in ("tensor_model", "pipeline_model", "context"))
    tokens = config.data.tokens_per_micro_batch
    assert f"-{tokens // 1024}k" in name and tokens <= config.model.max_positions
    assert NODE % tp == 0 and GPUS % (tp * pp * cp) == 0, "tensor parallelism stays inside a node"
    assert transformer.num_query_groups % tp == 0 and config.model.vocabulary_size % tp == 0
    replicas = GPUS // (tp * pp * cp)
    assert config.training.micro_batches_per_step % replicas == 0
    assert config.training.micro_batches_per_step // replicas >= 2 * pp or pp == 1, "a pipeline needs micro-batches"
    padding = Padding.for_layout(tp, cp, transformer.sequence_parallel, tokens)
    assert tokens % padding.row_multiple == 0
    assert config.training.lr_warmup_steps + config.training.wsd_decay_steps < config.training.steps
    stages = {"first": (0, pp - 1), "last": (GPUS - 1, 0)} if pp > 1 else {"whole": (0, 0)}
    total = 0
    for stage, (rank, after) in stages.items():
        all_of_it, trained, layers = parameters(config, transformer, rank)
        total += layers
        shares = replicas * cp if optimizer.use_distributed_optimizer else 1
        memory = 2 * all_of_it + 4 * trained + 12 * trained // shares + ENCODER
        memory += activations(transformer, tokens, layers, after)
        print(f"{name} {stage} stage: {memory / 2**30:.1f} GiB")
        assert memory < USABLE, f"{stage} stage: {memory / 2**30:.1f} GiB"
    assert pp > 2 or total == transformer.num_layers


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun.sh"])
def test_launchers_are_shell_and_say_how_to_use_them(script):
    path = EXAMPLES / "clusters" / script
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and "usage:" in done.stderr
    named = {word for word in path.read_text().split() if word.startswith("examples/recipes/")}
    assert named and all((EXAMPLES.parent / word).is_file() for word in named)
