"""A clip's bits depend on the clip alone: not on its companions, its place, the threads, the number of clips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder

# Width and heads as in whisper-base, so that the same matrix-product and attention kernels run; one layer is enough.
CONFIG = EncoderConfig(mels=80, width=512, layers=1, heads=8, ffn_width=2048)
VALID = (3, 30, 30, 31, 64, 200, 200, 401, 402)


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return AudioEncoder(CONFIG, block=256).reset_parameters(seed=5)


def clips(valid: tuple[int, ...] = VALID, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(CONFIG.mels, frames + 2, generator=generator) for frames in valid]


@pytest.fixture(scope="module")
def alone(encoder) -> list[torch.Tensor]:
    return [encoder.encode([clip])[0] for clip in clips()]


def assert_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)] == [True] * len(expected)


def test_packed_equals_alone(encoder, alone):
    assert_bits(encoder.encode(clips()), alone)


@settings(max_examples=8)
@given(order=st.permutations(range(len(VALID))), count=st.integers(1, len(VALID)), max_rows=st.sampled_from([1, 256, 300, 4096]))
def test_any_choice_order_and_pack_size_gives_the_same_bits(encoder, alone, order, count, max_rows):
    chosen = order[:count]
    everything = clips()
    assert_bits(encoder.encode([everything[i] for i in chosen], max_rows), [alone[i] for i in chosen])


def test_any_order_inside_one_pack_gives_the_same_bits(encoder, alone):
    """`encode` sorts by length; the module itself must not depend on it."""
    everything = clips()
    order = [7, 1, 5, 0, 8, 2, 4, 6, 3]
    packed, frames = encoder(torch.cat([everything[i] for i in order], 1), [everything[i].shape[1] for i in order])
    assert_bits(list(packed.split(frames)), [alone[i] for i in order])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_nothing(encoder, alone, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_bits(encoder.encode(clips()), alone)
    finally:
        torch.set_num_threads(before)


def test_blocks_are_what_makes_it_so(encoder):
    """Without a canonical shape the library does choose another order of summation for a few rows: the blocks are needed."""
    weight = encoder.blocks[0].mlp[2]
    rows = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
    whole = weight(rows)
    assert any(not torch.equal(weight(rows[:count]), whole[:count]) for count in (1, 2, 3, 5, 8, 15))


def test_a_neighbour_of_the_same_length_never_leaks_and_one_of_another_length_neither(encoder, alone):
    everything = clips()
    everything[2] = torch.full_like(everything[2], 3.0)
    everything[4] = torch.full((CONFIG.mels, 97), -2.0)
    actual = encoder.encode(everything)
    same = [torch.equal(a, b) for a, b in zip(actual, alone, strict=True)]
    assert same == [index not in (2, 4) for index in range(len(VALID))]


def test_fingerprint_names_what_changes_bits():
    def fingerprint(block=64, compat="clean", seed=0, **sizes):
        config = EncoderConfig(**{"mels": 4, "width": 8, "layers": 1, "heads": 2, "ffn_width": 8} | sizes)
        return AudioEncoder(config, block, compat).reset_parameters(seed).fingerprint()

    assert fingerprint() == fingerprint() == fingerprint(weights="elsewhere")
    others = [
        fingerprint(block=128),
        fingerprint(compat="step"),
        fingerprint(seed=1),
        fingerprint(heads=4),
        fingerprint(pooling=False),
    ]
    assert len({fingerprint(), *others}) == 6


def test_the_encoder_is_frozen(encoder):
    features = encoder.encode([clips()[1].requires_grad_()])[0]
    assert not features.requires_grad and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert features.dtype == torch.float32


def test_random_weights_are_those_of_the_seed_and_leave_global_state_alone():
    config = EncoderConfig(mels=4, width=8, layers=1, heads=2, ffn_width=8)
    first, second = (AudioEncoder(config).reset_parameters(7) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    state = torch.get_rng_state()
    first.reset_parameters(8)
    assert torch.equal(torch.get_rng_state(), state) and first.fingerprint() != second.fingerprint()
