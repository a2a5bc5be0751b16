"""Two-batch overlap: strategies and their files, and halves of a batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.errors import UserError
from runner.model.operations import LayerState, Operation, cut_stages
from runner.model.strategy import (
    COMM_SMS,
    MARK,
    NEEDS,
    STRATEGIES,
    OverlapStrategy,
    concatenate,
    load_strategy,
)


def operation(name: str) -> Operation:
    def run(state: LayerState) -> None:
        raise AssertionError(name)

    run.__name__ = name
    return run


OPERATIONS = {name: operation(name) for name in NEEDS}
PREFILL = (
    "comm_prepare_attn, attn_prepare, attn_core, comm_prepare_mlp, gate, select_experts, "
    "dispatch_a | dispatch_b, experts, combine_a | shared_experts, combine_b, output, "
    "comm_postprocess_layer"
)
DECODE = (
    "comm_prepare_attn, attn_prepare | attn_core, comm_prepare_mlp, gate, select_experts "
    "| dispatch_a, shared_experts | dispatch_b, experts, combine_a | combine_b"
)


@pytest.mark.parametrize(
    ("name", "mode", "delta", "sms", "steps"),
    [
        ("deepseek-decode-before", "decode", 2, 0, f"{DECODE}, output, comm_postprocess_layer |"),
        ("deepseek-decode", "decode", 2, 0, f"{DECODE} | output, comm_postprocess_layer"),
        ("deepseek-prefill", "extend", 0, COMM_SMS, PREFILL),
        ("dsv4-prefill", "extend", 0, 0, PREFILL),
    ],
)
def test_named_strategies_are_upstreams(
    name: str, mode: str, delta: int, sms: int, steps: str
) -> None:
    strategy = load_strategy(name)
    assert strategy.mode.value == mode
    assert (strategy.delta_stages, strategy.comm_sms) == (delta, sms)
    assert strategy.describe() == steps


@pytest.mark.parametrize(
    ("name", "layers", "stages"),
    [
        ("deepseek-decode-before", 1, 5),
        ("deepseek-decode-before", 3, 15),
        ("deepseek-decode", 1, 6),
        ("deepseek-decode", 3, 16),
        ("deepseek-prefill", 3, 7),
    ],
)
def test_stages_without_a_mark_at_the_end_run_into_the_next_layer(
    name: str, layers: int, stages: int
) -> None:
    steps = [step for _ in range(layers) for step in STRATEGIES[name].arrange(OPERATIONS)]
    assert len(cut_stages(steps)) == stages


# -- strategies of a user's own -------------------------------------------------------------------


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_a_file_with_all_it_can_have(tmp_path: Path) -> None:
    text = f'''
        mode = "extend"
        operations = """{" ".join(NEEDS)}|"""
        delta_stages = 1
        comm_sms = 8
    '''
    strategy = load_strategy(written(tmp_path, text))
    assert strategy == OverlapStrategy("mine", ForwardMode.EXTEND, (*NEEDS, MARK), 1, 8)
    assert OverlapStrategy.from_json(strategy.to_json()) == strategy


def test_commas_are_allowed_and_numbers_default_to_0(tmp_path: Path) -> None:
    text = f'mode = "decode"\noperations = "{", ".join(NEEDS)}"'
    strategy = load_strategy(written(tmp_path, text))
    assert (strategy.steps, strategy.delta_stages, strategy.comm_sms) == (tuple(NEEDS), 0, 0)


ALL = " ".join(NEEDS)
BAD = {
    "missing": (ALL.replace(" gate", ""), "gate missing: a layer needs every operation"),
    "repeated": (f"{ALL} gate", "gate is there twice"),
    "unknown": (f"{ALL} mlp", "there is no operation 'mlp'"),
    "order": (
        ALL.replace("dispatch_a shared_experts dispatch_b", "dispatch_b shared_experts dispatch_a"),
        "dispatch_b comes before dispatch_a, whose result it",
    ),
    "late shared": (
        ALL.replace("shared_experts ", "") + " shared_experts",
        "output comes before shared_experts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_operations_that_do_not_go(tmp_path: Path, name: str) -> None:
    operations, message = BAD[name]
    with pytest.raises(UserError, match=f"^strategy mine: {message}"):
        load_strategy(written(tmp_path, f'mode = "decode"\noperations = "{operations}"'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('mode = "decode"', "'operations' is missing"),
        (f'operations = "{ALL}"', "'mode' is missing"),
        (f'mode = "prefill"\noperations = "{ALL}"', "mode 'prefill' must be extend or decode"),
        (f'mode = "decode"\noperations = "{ALL}"\ndelta_stages = true', "delta_stages = True"),
        (f'mode = "decode"\noperations = "{ALL}"\ndelta_stages = -1', "delta_stages = -1 must be"),
        (f'mode = "decode"\noperations = "{ALL}"\ncomm_sms = -1', "comm_sms = -1 must be"),
        (f'mode = "decode"\noperations = "{ALL}"\nsms = 3', "'sms' is not known"),
        ("mode = ", "cannot read the overlap strategy"),
    ],
)
def test_files_that_are_no_strategy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_strategy(written(tmp_path, text))


def test_a_name_that_is_neither_known_nor_a_file() -> None:
    with pytest.raises(UserError, match="'decode' is not known: use one of deepseek-decode-before"):
        load_strategy("decode")


def test_a_stage_runs_from_one_layer_into_the_next() -> None:
    stages = concatenate(STRATEGIES["deepseek-decode"], [OPERATIONS] * 3)
    assert len(stages) == 16
    assert [step.__name__ for step in stages[5]] == [
        "output",
        "comm_postprocess_layer",
        "comm_prepare_attn",
        "attn_prepare",
    ]


def test_a_batch_cannot_be_further_ahead_than_there_are_stages() -> None:
    far = replace(STRATEGIES["deepseek-decode"], delta_stages=7)
    assert len(concatenate(far, [OPERATIONS] * 2)) == 11
    with pytest.raises(UserError, match="delta_stages = 7 must be at most 6, the stages of the"):
        concatenate(far, [OPERATIONS])


@given(st.permutations(list(NEEDS)))
def test_an_order_is_legal_or_refused_with_a_reason(order: list[str]) -> None:
    legal = all(
        order.index(need) < order.index(name) for name, needs in NEEDS.items() for need in needs
    )
    try:
        strategy = OverlapStrategy("any", ForwardMode.DECODE, tuple(order), 0)
    except UserError as error:
        assert not legal and "whose result it needs" in str(error)
    else:
        assert legal and [OPERATIONS[name] for name in order] == strategy.arrange(OPERATIONS)


# -- halves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lens", "first"),
    [((1, 1), 1), ((1, 1, 1), 1), ((5, 1, 1), 1), ((1, 1, 5), 2), ((3, 4, 5, 6, 7), 3)],
)
def test_a_batch_is_cut_between_sequences(lens: tuple[int, ...], first: int) -> None:
    ids = tuple(range(sum(lens)))
    halves = ForwardBatch.extend(lens, input_ids=ids).halves
    assert halves is not None
    assert halves[0].extend_seq_lens == lens[:first] and halves[1].seq_lens == lens[first:]
    assert (*(halves[0].input_ids or ()), *(halves[1].input_ids or ())) == ids


def test_one_sequence_is_not_cut() -> None:
    assert ForwardBatch.extend((9,)).halves is None


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_no_other_cut_is_more_even(lens: list[int]) -> None:
    halves = ForwardBatch.extend(lens).halves
    assert halves is not None
    off = abs(halves[0].num_tokens - halves[1].num_tokens)
    assert off == min(abs(sum(lens) - 2 * sum(lens[:cut])) for cut in range(1, len(lens)))
