"""Scenario options: round trips of all fields through options, argv and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.config.environ import Bf16Fp32Algo, Environ
from runner.config.fields import OptionDetails, option
from runner.config.hf import with_layers
from runner.config.parallel import ParallelConfig
from runner.config.presets import DSV3, DSV4, DSV4_TINY
from runner.config.warmup import DisaggregationMode, WarmupPolicy
from runner.errors import UserError
from runner.kernels.types import DeepGemmKernelType
from runner.model.strategy import STRATEGIES, OverlapStrategy
from runner.options import ScenarioOptions, scenario_options, to_argv, with_options
from runner.scenario import Scenario

GROUPS = ("model", "deployment", "plan", "run", "placement")


def parsed(*arguments: str) -> ScenarioOptions:
    """The options that a command receives."""
    found: list[ScenarioOptions] = []

    @click.command()
    @with_options(scenario_options(*GROUPS))
    def command(given: ScenarioOptions) -> None:
        found.append(given)

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    if result.exit_code:
        raise UserError(result.output.splitlines()[-1])
    return found[0]


COUNTS = st.lists(st.integers(1, 300), min_size=1, max_size=3).map(tuple)
LAYOUTS = [
    {"pp": 2, "tp": 2},
    {"pp": 2, "tp": 2, "ep": True, "moe_a2a": True, "replicas": 2, "nodes": 2},
    {"pp": 1, "tp": 4, "attn_cp": 2, "nodes": 4},
    {"pp": 2, "tp": 1, "stage_layers": (1, 2)},
]
VALUES = {
    "policy": st.sampled_from(WarmupPolicy),
    "num_sms": st.integers(100, 200),
    "reduced_num_sms": st.lists(st.integers(1, 100), max_size=2).map(tuple),
    "overlap": st.sampled_from(
        [(), (STRATEGIES["deepseek-decode"],), (STRATEGIES["dsv4-prefill"],)]
    ),
    "max_tokens": st.integers(400, 131072),
    "disaggregation": st.sampled_from([DisaggregationMode.NONE, DisaggregationMode.DECODE]),
    "decode_batch_sizes": st.none() | COUNTS,
    "without": st.lists(st.sampled_from(DeepGemmKernelType), max_size=2, unique=True).map(tuple),
    "batch_sizes": COUNTS,
    "prompt_len": st.integers(1, 9),
    "stream": st.none() | COUNTS,
    "graph_batch_sizes": COUNTS.map(lambda sizes: tuple(4 * size for size in sizes)),
    "walk_max_m": st.none() | st.integers(1, 9999),
    "walk_memory": st.none() | st.integers(1, 900).map(lambda gib: gib * 2.0**29),
    "compile_lock": st.booleans(),
    "speculative": st.booleans(),
    "bf16_fp32_algo": st.sampled_from(Bf16Fp32Algo),
}
"""A hypothesis strategy per plain field of Scenario; each new field needs one."""


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    model = draw(st.sampled_from([with_layers(each, 3) for each in (DSV4, DSV3)]))
    layout = draw(st.sampled_from(LAYOUTS))
    return Scenario(
        model=model,
        parallel=ParallelConfig(**layout),  # type: ignore[arg-type]
        **{name: draw(values) for name, values in VALUES.items()},  # type: ignore[attr-defined]
    )


def resolved(made: Scenario) -> Scenario:
    return replace(made, batch_sizes=made.resolved_batch_sizes)


def test_round_trip_tests_cover_every_field() -> None:
    names = {item.name for item in fields(Scenario)} - {"model", "parallel", "source"}
    assert names == set(VALUES)
    assert {name for layout in LAYOUTS for name in layout} == {
        item.name for item in fields(ParallelConfig)
    }


@given(scenarios())
def test_scenario_round_trips_through_json(made: Scenario) -> None:
    data = json.loads(json.dumps(made.to_json()))
    assert Scenario.from_json(data) == resolved(made)


@settings(deadline=None)
@given(scenarios())
def test_scenario_round_trips_through_argv(made: Scenario) -> None:
    names = {item.name for item in parsed().options}
    parallel = {item.name: getattr(made.parallel, item.name) for item in fields(ParallelConfig)}
    own = {item.name: getattr(made, item.name) for item in fields(Scenario)}
    given = {name: value for name, value in (own | parallel).items() if name in names}
    given |= {
        "model": made.model.name,
        "layers": made.model.num_hidden_layers,
        "overlap": tuple(strategy.name for strategy in made.overlap),
    }
    options = replace(parsed(), given=given)
    again = parsed(*options.to_argv())
    assert again.given == given
    fixed = {name: own[name] for name in ("policy", "num_sms", "reduced_num_sms", "bf16_fp32_algo")}
    assert again.scenario(Environ(), **fixed) == made


def test_option_defaults_are_the_dataclass_defaults() -> None:
    assert parsed().to_argv() == []
    assert parsed().scenario(Environ()) == Scenario(model=DSV4)


def test_default_is_one_node_per_stage_and_replica() -> None:
    made = parsed("--pp", "4", "--tp", "2", "--replicas", "2").scenario(Environ())
    assert made.parallel.nodes == 8
    assert parsed("--pp", "4", "--nodes", "2").scenario(Environ()).parallel.nodes == 2


def test_environment_applies_where_no_option_is_given() -> None:
    environ = Environ(pp_layer_partition="1,2", bf16_fp32_algo=Bf16Fp32Algo.TORCH)
    tiny = ("--model", "dsv4-tiny", "--layers", "3", "--pp", "2")
    made = parsed(*tiny).scenario(environ)
    assert (made.parallel.stage_layers, made.bf16_fp32_algo) == ((1, 2), Bf16Fp32Algo.TORCH)
    assert parsed(*tiny, "--stage-layers", "2,1").scenario(environ).parallel.stage_layers == (2, 1)


def test_strategy_from_a_file_round_trips_through_json(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(STRATEGIES["deepseek-decode"].to_toml())
    arguments = ("--model", "dsv4-tiny", "--overlap", str(path))
    made = parsed(*arguments).scenario(Environ(), batch_sizes=(1,))
    assert made.overlap == (replace(STRATEGIES["deepseek-decode"], name="mine"),)
    assert Scenario.from_json(made.to_json()) == made
    assert isinstance(made.overlap[0], OverlapStrategy)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"pp": 0}, "its 'pp' is 0, not a whole number from 1 on"),
        ({"pp": True}, "its 'pp' is True, not a whole number from 1 on"),
        ({"ep": 1}, "its 'ep' is 1, not true or false"),
        ({"stream": 4}, "its 'stream' is 4, not a list"),
        ({"stream": [4, "x"]}, "its 'stream' is 'x', not a whole number from 1 on"),
        ({"walk_memory": -1}, "its 'walk_memory' is -1, not a number above 0"),
        ({"model": 3}, "its 'model' is 3, not a word"),
        ({"policy": "swift"}, "its 'policy' is 'swift', not one of none, full, fast, pp-parallel"),
        ({"disaggregation": None}, "its 'disaggregation' is None, not one of none, prefill"),
    ],
)
def test_invalid_json_values_are_refused(change: dict[str, object], line: str) -> None:
    data = Scenario(model=DSV4_TINY, batch_sizes=(1,)).to_json()
    with pytest.raises(ValueError, match="its") as caught:
        Scenario.from_json(data | change)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("name", ["model", "layers", "pp", "tp", "nodes", "num_sms", "batch_sizes"])
def test_required_json_field_must_be_present(name: str) -> None:
    data = Scenario(model=DSV4_TINY, batch_sizes=(1,)).to_json()
    del data[name]
    with pytest.raises(KeyError, match=name):
        Scenario.from_json(data)


def test_optional_json_fields_have_defaults() -> None:
    made = Scenario(model=DSV4_TINY, batch_sizes=(1,))
    data = made.to_json()
    for name in ("without", "decode_batch_sizes", "overlap", "moe_a2a", "library"):
        del data[name]
    assert Scenario.from_json(data) == made


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--stream", "4,0"], "'4,0' must be whole numbers from 1 on, such as 1,128,1024"),
        (["--batch-sizes", "x"], "'x' must be whole numbers from 1 on"),
        (["--prompt-len", "0"], "0 is not in the range x>=1"),
        (["--walk-memory", "nan"], "'nan' is not a finite number"),
        (["--disaggregation-mode", "both"], "'both' is not one of 'none', 'prefill', 'decode'"),
        (["--without", "what"], "'what' is not one of 'gemm_nt_f8f8bf16'"),
    ],
)
def test_invalid_options_are_refused(arguments: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*arguments)
    assert line in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = option(3, OptionDetails("A number."))
    on: bool = option(True, OptionDetails("On by default."))
    off: bool = option(False, OptionDetails("Off by default."))
    either: bool | None = option(None, OptionDetails("Neither by default."))
    paths: tuple[str, ...] = option((), OptionDetails("Again and again.", flag="--path"))
    file: Path | None = option(None, OptionDetails("A file."))
    limit: float | None = option(None, OptionDetails("Bytes.", unit="GIB"))


@given(
    st.builds(
        Sample,
        count=st.integers(-5, 5),
        on=st.booleans(),
        off=st.booleans(),
        either=st.none() | st.booleans(),
        paths=st.lists(st.sampled_from(["a", "b c"])).map(tuple),
        file=st.none() | st.just(Path("x y")),
        limit=st.none() | st.integers(1, 50).map(lambda gib: gib * 2.0**28),
    )
)
def test_option_dataclass_round_trips_through_argv(value: Sample) -> None:
    found: list[Sample] = []

    @click.command()
    @with_options(Sample)
    def command(given: Sample) -> None:
        found.append(given)

    CliRunner().invoke(command, to_argv(value), catch_exceptions=False)
    assert found == [value]
