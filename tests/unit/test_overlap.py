"""Two-batch overlap: strategies, stages, turns, and halves of a batch."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.backend.forward_batch import ForwardBatch, ForwardMode
from runner.errors import UserError
from runner.model.operations import (
    Operation,
    OperationState,
    Step,
    YieldOperation,
    cut_stages,
    execute_overlapped_operations,
    overlapped_order,
)
from runner.model.strategy import (
    COMM_SMS,
    MARK,
    NEEDS,
    STRATEGIES,
    OverlapStrategy,
    concatenate,
    load_strategy,
)

OPERATIONS = [Operation(name, lambda state: None) for name in NEEDS]
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
    ("name", "mode", "stages", "delta", "sms", "steps"),
    [
        (
            "deepseek-decode-before",
            "decode",
            5,
            2,
            0,
            f"{DECODE}, output, comm_postprocess_layer |",
        ),
        ("deepseek-decode", "decode", 6, 2, 0, f"{DECODE} | output, comm_postprocess_layer"),
        ("deepseek-prefill", "extend", 3, 0, COMM_SMS, PREFILL),
        ("dsv4-prefill", "extend", 3, 0, 0, PREFILL),
    ],
)
def test_named_strategies_are_upstreams(
    name: str, mode: str, stages: int, delta: int, sms: int, steps: str
) -> None:
    strategy = load_strategy(name)
    assert (strategy.mode.value, strategy.num_stages) == (mode, stages)
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


def test_marks_with_nothing_between_are_one() -> None:
    a, b = Operation("a", lambda state: None), Operation("b", lambda state: None)
    mark = YieldOperation()
    assert cut_stages([mark, a, mark, mark, b, mark]) == [(a,), (b,)]
    assert cut_stages([mark]) == []


def test_turns_with_a_batch_ahead() -> None:
    assert overlapped_order(3, 2) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert overlapped_order(4, 1) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (0, 2),
        (1, 1),
        (0, 3),
        (1, 2),
        (1, 3),
    ]


@given(st.integers(0, 40), st.data())
def test_every_stage_of_both_runs_once_in_its_order(stages: int, data: st.DataObject) -> None:
    delta = data.draw(st.integers(0, stages))
    order = overlapped_order(stages, delta)
    for batch in (0, 1):
        assert [stage for which, stage in order if which == batch] == list(range(stages))
    ahead = 0
    for which, _ in order:
        ahead += 1 if which == 0 else -1
        assert 0 <= ahead <= delta + 1


@pytest.mark.parametrize("delta", [-1, 4])
def test_a_delta_beyond_the_stages_is_refused(delta: int) -> None:
    with pytest.raises(ValueError, match=rf"delta_stages={delta} must lie in 0\.\.3, the stages"):
        overlapped_order(3, delta)


def test_two_batches_run_in_turns_with_states_of_their_own() -> None:
    seen: list[Any] = []

    def operation(name: str) -> Operation:
        return Operation(name, lambda state: seen.append((name, state.peek("batch"))))

    stages = [(operation("a"), operation("b")), (operation("c"),)]
    states = OperationState(batch="A"), OperationState(batch="B")
    execute_overlapped_operations(
        states, (stages, stages), 1, lambda kind, name: seen.append(f"{kind} {name}")
    )
    assert seen == [
        "batch 0",
        ("a", "A"),
        ("b", "A"),
        "batch 0",
        ("c", "A"),
        "batch 1",
        ("a", "B"),
        ("b", "B"),
        "batch 1",
        ("c", "B"),
        "batch both",
    ]


def test_a_batch_cannot_use_what_the_other_has_put() -> None:
    put = Operation("put", lambda state: state.put(x=1))
    leaks = (Operation("put", lambda state: None),)
    use = (Operation("use", lambda state: state.take("x")),)
    states = OperationState(), OperationState()
    with pytest.raises(RuntimeError, match="needs state 'x', which nothing has put"):
        execute_overlapped_operations(
            states, ([(put,), use], [leaks, use]), 0, lambda kind, name: None
        )


def test_batches_of_different_stages_are_refused() -> None:
    states = OperationState(), OperationState()
    with pytest.raises(ValueError, match="have 1 and 0 stages: they must agree"):
        execute_overlapped_operations(states, ([()], []), 0, lambda kind, name: None)


# -- strategies of a user's own ------------------------------------------------------------------


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
    assert (strategy.num_stages, strategy.delta_stages, strategy.comm_sms) == (1, 0, 0)


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


def test_layers_must_agree() -> None:
    decode, prefill = STRATEGIES["deepseek-decode"], STRATEGIES["deepseek-prefill"]
    whole = concatenate([(decode, OPERATIONS)] * 3)
    assert (len(whole.stages), whole.delta_stages, whole.comm_sms) == (16, 2, 0)
    assert [operation.name for operation in whole.stages[5]] == [
        "output",
        "comm_postprocess_layer",
        "comm_prepare_attn",
        "attn_prepare",
    ]
    with pytest.raises(UserError, match=r"must agree: deepseek-decode: delta_stages 2, comm_sms 0"):
        concatenate([(decode, OPERATIONS), (prefill, OPERATIONS)])


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
        assert legal and [step.name for step in arranged(strategy)] == order


def arranged(strategy: OverlapStrategy) -> list[Operation]:
    steps: list[Step] = strategy.arrange(OPERATIONS)
    return [step for step in steps if isinstance(step, Operation)]


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


def test_permutations_are_not_all_legal() -> None:
    """The property above sees both kinds."""
    tail = ["combine_b", "output", "shared_experts"]
    kinds = set()
    for order in permutations(tail):
        names = [name for name in NEEDS if name not in tail]
        at = names.index("comm_postprocess_layer")
        try:
            OverlapStrategy("any", ForwardMode.DECODE, (*names[:at], *order, *names[at:]), 0)
            kinds.add(True)
        except UserError:
            kinds.add(False)
    assert kinds == {True, False}
