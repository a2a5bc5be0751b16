"""The library's digest, against a second implementation and known vectors."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.cache.digest import DeepJitDigest, Digest, hex_digest

SEEDS = (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)


def fnv1a_64(data: bytes, offset_basis: int) -> int:
    """FNV-1a with the prime 2**40 + 2**8 + 0xb3 written as shifts."""
    state = offset_basis
    for byte in data:
        state ^= byte
        state = (state << 40) + (state << 8) + state * 0xB3
        state %= 1 << 64
    return state


def split_mix_64(state: int) -> int:
    """The output function of the SplitMix64 generator."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % (1 << 64)
    return state ^ state >> 31


def second_opinion(data: bytes) -> str:
    return "".join(f"{split_mix_64(fnv1a_64(data, seed)):016x}" for seed in SEEDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0xCBF29CE484222325), ("a", 0xAF63DC4C8601EC8C), ("foobar", 0x85944171F73967E8)],
)
def test_the_second_implementation_on_published_fnv_vectors(text: str, expected: int) -> None:
    assert fnv1a_64(text.encode(), 0xCBF29CE484222325) == expected


def test_the_second_implementation_on_published_split_mix_outputs() -> None:
    """The first outputs of SplitMix64 seeded with 0 and with 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert split_mix_64(gamma) == 0xE220A8397B1DCDAF
    assert split_mix_64(2 * gamma % 2**64) == 0x6E789E6AA1B965F4
    assert split_mix_64(1234567 + gamma) == 6457827717110365317


@given(st.binary(max_size=200))
def test_both_implementations_agree(data: bytes) -> None:
    assert hex_digest(data) == second_opinion(data)


@given(st.text(max_size=50))
def test_text_is_hashed_as_utf8(text: str) -> None:
    assert hex_digest(text) == hex_digest(text.encode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ddd805b8cbc69b1ee220a8397b1dcdaf"),
        ("a", "40eeb2539253514ed582412f6e474b8f"),
        ("kernel.sm90_fp8_gemm_1d2d", "b0782928da0215dc8773da38f7e95e9a"),
        ("é\n", "926ef062edb430ad145bba3584a46c00"),
    ],
)
def test_known_digests(text: str, expected: str) -> None:
    assert hex_digest(text) == expected


# DeepJIT's digest


def deep_jit(*texts: bytes) -> str:
    """Each text after its length in eight bytes; the second run multiplies by the golden ratio."""
    data = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    golden = 0xFF51AFD7ED558CCD
    for byte in data:
        golden = (golden ^ byte) * 0x9E3779B97F4A7C15 % (1 << 64)
    return f"{split_mix_64(fnv1a_64(data, SEEDS[0])):016x}{split_mix_64(golden):016x}"


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_deep_jits_digest_by_a_second_implementation(texts: list[bytes]) -> None:
    digest = DeepJitDigest()
    for text in texts:
        digest = digest.update(text)
    assert digest.hex == deep_jit(*texts)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "ddd805b8cbc69b1eab0665cdad96ab45"),
        ([""], "601991819c51b6b40cce57df1139bba4"),
        (["ab"], "ee8e35d8cc4dc26e5e463c7c75faa457"),
        (["a", "b"], "47f0455dd7b38256f2732cb8bc2d7390"),
    ],
)
def test_known_deep_jit_digests(texts: list[str], expected: str) -> None:
    digest = DeepJitDigest()
    for text in texts:
        digest = digest.update(text)
    assert digest.hex == expected


@pytest.mark.parametrize("kind", [Digest, DeepJitDigest])
def test_digests_go_on_from_a_common_beginning(kind: type[Digest]) -> None:
    common = kind().update("common")
    before = common.hex
    assert common.update("a").hex == kind().update("common").update("a").hex
    assert common.update("b").hex != common.update("a").hex
    assert common.hex == before
    assert isinstance(common.update("a"), kind)
    assert common == kind().update("common") and hash(common) == hash(kind().update("common"))


def test_only_deep_jits_digest_knows_where_a_text_ends() -> None:
    assert Digest().update("a").update("b") == Digest().update("ab")
    assert DeepJitDigest().update("a").update("b") != DeepJitDigest().update("ab")
    assert Digest().update("ab").hex == hex_digest("ab")
