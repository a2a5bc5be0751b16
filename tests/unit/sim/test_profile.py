"""Hardware profiles: the file format, validation and scaling."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from runner.errors import UserError
from sim.costs.profile import (
    Link,
    Phase,
    Profile,
    load_profile,
    shipped_profiles,
    slowed,
    write_profile,
)
from sim.costs.start_up import Weights

GOOD: dict[str, Any] = load_profile("h200").to_json()


def changed(where: str, value: Any) -> dict[str, Any]:
    """The h200 profile with one value replaced, or removed if ``value`` is "drop"."""
    data = copy.deepcopy(GOOD)
    *folders, name = where.split("/")
    inside = data
    for folder in folders:
        inside = inside[folder]
    if value == "drop":
        del inside[name]
    else:
        inside[name] = value
    return data


@pytest.mark.parametrize("name", shipped_profiles())
def test_shipped_profile_has_its_file_name_and_round_trips(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name and profile.provenance
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile


def test_written_profile_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = Profile.from_json({**changed("cache/load", 0.5), "name": "mine", "estimate": True})
    write_profile(path, mine)
    assert load_profile(str(path)) == mine
    assert mine.cache.load == 0.5 and mine.estimate


def test_optional_fields_have_defaults() -> None:
    data = changed("links", {"x": {"latency": 0, "bandwidth": 5}})
    del data["estimate"], data["provenance"]
    profile = Profile.from_json(data)
    assert profile.links["x"] == Link(0, 5, None, queues=False)
    assert (profile.estimate, profile.provenance) == (False, [])


WRONG = {
    "cache/load": (-0.1, "cache.load is -0.1, not a number from 0 on"),
    "compile/contention": (-1, "compile.contention is -1, not a number from 0 on"),
    "compile/scale/sm90_bf16_gemm": (-2.0, "compile.scale.sm90_bf16_gemm is -2.0"),
    "compile/by_config": ({"a": "x"}, "compile.by_config.a is 'x', not a number"),
    "gpu/memory_bandwidth": (0, "gpu.memory_bandwidth is 0, not a number above 0"),
    "gpu/fp8_flops": (0.0, "gpu.fp8_flops is 0.0, not a number above 0"),
    "gpu/memory": (0, "gpu.memory is 0, not a number above 0"),
    "links/gloo/bandwidth": (0, "links.gloo.bandwidth is 0, not a number above 0"),
    "links/gloo/gather_bandwidth": (0, "links.gloo.gather_bandwidth is 0, not a number above 0"),
    "links/nvlink/latency": ("1 us", "links.nvlink.latency is '1 us', not a number"),
    "start_up/weight_bandwidth/disk": (0, "start_up.weight_bandwidth.disk is 0"),
    "start_up/weights_made": (0, "start_up.weights_made is 0, not a number above 0"),
    "start_up/imports/per_rank": (-1, "start_up.imports.per_rank is -1"),
    "probe/seconds": (0, "probe.seconds is 0, not a number above 0"),
    "probe": ({"seconds": "long"}, "probe.seconds is 'long', not a number"),
    "num_sms": (0, "num_sms is 0, not a whole number from 1 on"),
    "cores_per_node": (True, "cores_per_node is True, not a whole number"),
    "cache/verify": (None, "cache.verify is None, not a number"),
    "compile/scale": (3, "compile.scale is 3, not an object"),
    "links/gloo/queues": ("no", "links.gloo.queues is 'no', not true or false"),
    "provenance": ("text", "provenance is 'text', not a list"),
    "name": (3, "name is 3, not a word"),
    "host/call": (float("inf"), "host.call is inf, not a number from 0 on"),
    "host/first_forward": (-1.0, "host.first_forward is -1.0, not a number from 0 on"),
    "gpu/bf16_flops": (float("nan"), "gpu.bf16_flops is nan, not a number above 0"),
    "start_up/weight_bandwidth": ({}, "start_up.weight_bandwidth lacks disk"),
    "host/walk": ([1], "host.walk is [1], not a number"),
}


@pytest.mark.parametrize("where", WRONG)
def test_error_names_the_invalid_field_and_value(where: str) -> None:
    value, words = WRONG[where]
    with pytest.raises((ValueError, TypeError)) as caught:
        Profile.from_json(changed(where, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "where",
    ["name", "compile", "compile/contention", "links/nvlink/latency", "start_up/imports", "probe"],
)
def test_missing_field_is_refused_and_named_with_the_file(where: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(changed(where, "drop")))
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path} is not a hardware profile: ")
    assert where.rsplit("/", maxsplit=1)[-1] in line


@pytest.mark.parametrize("where", ["speed", "gpu/speed", "probe/speed", "start_up/imports/speed"])
def test_unknown_field_is_refused(where: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(changed(where, 1)))
    with pytest.raises(UserError, match=r"is not a hardware profile: .*'speed'"):
        load_profile(str(path))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("links", 3),
        ("links/gloo", 3),
        ("gpu", []),
        ("start_up", None),
        ("compile/by_config", [1]),
        ("start_up/weight_bandwidth", None),
        ("start_up/weights_made", {"dummy": 1e10}),
        ("probe", 2.3),
        ("probe", None),
        ("probe", [2.3, 30.0]),
        ("estimate", "no"),
        ("num_sms", 1.5),
    ],
)
def test_value_of_wrong_type_is_refused(where: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(changed(where, value)))
    with pytest.raises(UserError, match="is not a hardware profile: "):
        load_profile(str(path))


def test_deeply_nested_profile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"is not a hardware profile: .*nested too deeply"):
        load_profile(str(path))


def test_obsolete_fields_of_older_profiles_are_ignored() -> None:
    old = copy.deepcopy(GOOD)
    old["compile"]["spread"], old["probe"]["settling"] = 0.05, "whatever"
    assert Profile.from_json(old) == Profile.from_json(GOOD)


def test_every_weight_source_except_dummy_requires_a_bandwidth() -> None:
    sources = {source.value for source in Weights if source is not Weights.DUMMY}
    assert set(GOOD["start_up"]["weight_bandwidth"]) == sources
    for source in sources:
        with pytest.raises(ValueError, match=rf"weight_bandwidth lacks {source}"):
            Profile.from_json(changed(f"start_up/weight_bandwidth/{source}", "drop"))


def test_unknown_hardware_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError) as caught:
        load_profile("abacus")
    known = ", ".join(shipped_profiles())
    assert str(caught.value) == (
        f"hardware 'abacus' is not known: use one of {known}, or a profile file"
    )


def test_link_time_is_latency_plus_bytes_over_bandwidth() -> None:
    assert Link(2.0, 100.0).seconds(300) == 5.0


def test_phase_time_grows_with_the_number_of_ranks() -> None:
    assert Phase(3.0, 0.5).of(4) == 5.0
    assert Phase(3.0).of(4) == 3.0


def test_slowed_profile_scales_cpu_times_only() -> None:
    profile = load_profile("h200")
    slow = slowed(profile, 2.0)
    assert slowed(profile, 1.0) == profile
    assert (slow.gpu, slow.links, slow.probe) == (profile.gpu, profile.links, profile.probe)
    assert slow.compile.contention == profile.compile.contention
    assert slow.start_up.weights_made == profile.start_up.weights_made
    assert slow.start_up.weight_bandwidth == profile.start_up.weight_bandwidth
    before, after = profile.to_json(), slow.to_json()
    for part in ("builder", "cache", "host"):
        assert after[part] == {name: 2 * value for name, value in before[part].items()}
    for part in ("by_config", "scale"):
        assert after["compile"][part] == {k: 2 * v for k, v in before["compile"][part].items()}
    assert slow.compile.default_scale == 2 * profile.compile.default_scale
    for name in ("imports", "process_group", "weights"):
        assert after["start_up"][name] == {k: 2 * v for k, v in before["start_up"][name].items()}
    for name in ("capture", "capture_operation"):
        assert after["start_up"][name] == 2 * before["start_up"][name]


def test_durations_may_be_zero() -> None:
    for where in (
        "cache/verify",
        "host/call",
        "host/first_forward",
        "links/gloo/latency",
        "start_up/capture",
    ):
        Profile.from_json(changed(where, 0))
