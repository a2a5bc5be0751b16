"""Two-batch overlap: strategies, strategy files, and splitting a batch into halves."""

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
def test_named_strategies_match_sglang(
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
def test_number_of_stages_over_several_layers(name: str, layers: int, stages: int) -> None:
    steps = [step for _ in range(layers) for step in STRATEGIES[name].arrange(OPERATIONS)]
    assert len(cut_stages(steps)) == stages


# -- strategy files -------------------------------------------------------------------------------


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_strategy_file_with_all_settings(tmp_path: Path) -> None:
    text = f'''
        mode = "extend"
        operations = """{" ".join(NEEDS)}|"""
        delta_stages = 1
        comm_sms = 8
    '''
    strategy = load_strategy(written(tmp_path, text))
    assert strategy == OverlapStrategy("mine", ForwardMode.EXTEND, (*NEEDS, MARK), 1, 8)
    assert OverlapStrategy.from_json(strategy.to_json()) == strategy


def test_strategy_file_with_commas_and_default_numbers(tmp_path: Path) -> None:
    text = f'mode = "decode"\noperations = "{", ".join(NEEDS)}"'
    strategy = load_strategy(written(tmp_path, text))
    assert (strategy.steps, strategy.delta_stages, strategy.comm_sms) == (tuple(NEEDS), 0, 0)


ALL = " ".join(NEEDS)
BAD = {
    "missing": (ALL.replace(" gate", ""), "gate missing: a layer needs every operation"),
    "repeated": (f"{ALL} gate", "gate appears twice: give each operation once"),
    "unknown": (f"{ALL} mlp", "operation 'mlp' is not one of"),
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
def test_invalid_order_of_operations_is_refused(tmp_path: Path, name: str) -> None:
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
def test_invalid_strategy_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_strategy(written(tmp_path, text))


def test_unknown_strategy_name_is_refused() -> None:
    with pytest.raises(UserError, match="'decode' is not known: use one of deepseek-decode-before"):
        load_strategy("decode")


def test_stage_without_a_final_mark_continues_in_the_next_layer() -> None:
    stages = concatenate(STRATEGIES["deepseek-decode"], [OPERATIONS] * 3)
    assert len(stages) == 16
    assert [step.__name__ for step in stages[5]] == [
        "output",
        "comm_postprocess_layer",
        "comm_prepare_attn",
        "attn_prepare",
    ]


def test_delta_stages_above_the_number_of_stages_is_refused() -> None:
    far = replace(STRATEGIES["deepseek-decode"], delta_stages=7)
    assert len(concatenate(far, [OPERATIONS] * 2)) == 11
    with pytest.raises(UserError, match="delta_stages = 7 must be at most 6, the stages of the"):
        concatenate(far, [OPERATIONS])


@given(st.permutations(list(NEEDS)))
def test_order_is_accepted_if_and_only_if_dependencies_hold(order: list[str]) -> None:
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
def test_batch_is_split_between_sequences(lens: tuple[int, ...], first: int) -> None:
    ids = tuple(range(sum(lens)))
    halves = ForwardBatch.extend(lens, input_ids=ids).halves
    assert halves is not None
    assert halves[0].extend_seq_lens == lens[:first] and halves[1].seq_lens == lens[first:]
    assert (*(halves[0].input_ids or ()), *(halves[1].input_ids or ())) == ids


def test_single_sequence_is_not_split() -> None:
    assert ForwardBatch.extend((9,)).halves is None


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_split_is_as_even_as_possible(lens: list[int]) -> None:
    halves = ForwardBatch.extend(lens).halves
    assert halves is not None
    off = abs(halves[0].num_tokens - halves[1].num_tokens)
    assert off == min(abs(sum(lens) - 2 * sum(lens[:cut])) for cut in range(1, len(lens)))
