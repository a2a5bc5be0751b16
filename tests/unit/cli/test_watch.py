"""``runner watch``: reports every compile and refuses forbidden ones."""

import json
import sys
from pathlib import Path

import pytest

from runner.kernels.describe import config_of
from runner.planning.plan import plan_to_json
from runner.watch.shim import FORBIDDEN_EXIT, CompileRecord
from tests.unit.small_cache import keys_for, small_library, small_plan
from tests.unit.watched_server import (
    ITEMS,
    MIDDLE,
    RUNNER,
    SMALL,
    SMALL_WORDS,
    TIME,
    reports,
    run,
    server,
    summary,
    watched,
)

pytestmark = pytest.mark.timeout(120)

MIDDLE_WORDS = "sm90_fp8_gemm_1d2d (tile 32x32x128, 16 stages, 132 SMs)"


def test_watch_reports_every_compile_and_a_summary_per_process(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "rank=3", "compile=../middle.cu", "compile=../middle.cu"]
    ran = run(room, fake_nvcc, server(room, *steps))
    assert ran.code == 0
    assert ran.compiles == ["compile 0 "] * 3 and len(ran.out) == 4
    assert len(ran.err) == 4
    assert reports(ran.err[0], SMALL_WORDS)
    assert reports(ran.err[1], MIDDLE_WORDS, rank="rank 3, ")
    assert reports(ran.err[2], MIDDLE_WORDS, rank="rank 3, ")
    each = rf", rank 3, pid {ran.pid} \([^)]*\): 2; pid {ran.pid} \([^)]*\): 1"
    assert summary(ran.err[3], 3, 2, each)
    cubins = sorted(path.read_text() for path in room.rglob("kernel.cubin"))
    assert cubins == sorted([SMALL.kernel.body, MIDDLE.kernel.body, MIDDLE.kernel.body])


def test_command_without_compiles_gets_only_a_summary(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room))
    assert (ran.code, ran.out) == (0, [f"pid {ran.pid}"])
    assert len(ran.err) == 1 and summary(ran.err[0], 0, 0)


def test_failed_compile_is_reported_but_does_not_change_the_exit_code(
    room: Path, fake_nvcc: Path
) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../broken.cu"))
    assert ran.code == 0
    assert ran.compiles == ["compile 3 error: it is broken"]
    assert reports(ran.err[0], "unknown ()", outcome=rf"{TIME}, failed with 3")
    assert summary(ran.err[1], 1, 1, r", pid .*: 1")


def test_json_describes_each_compile(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "touch=flag", "rank=3", "compile=../broken.cu", "exit=0"]
    command = server(room, *steps)
    ran = run(room, fake_nvcc, command, "--json", "out.json", "--forbid-after", "flag")
    assert ran.code == 1
    data = json.loads((room / "out.json").read_text())
    assert set(data) == {"version", "command", "exit_code", "seconds", "compiles"}
    assert (data["version"], data["command"], data["exit_code"]) == (1, command, 0)
    first, second = data["compiles"]
    assert (
        set(first)
        == set(second)
        == {
            "start",
            "seconds",
            "exit_code",
            "forbidden",
            "rank",
            "pid",
            "command",
            "name",
            "config",
            "uses",
        }
    )
    assert 0 <= first["start"] <= first["start"] + first["seconds"] <= second["start"] + 0.002
    assert second["start"] + second["seconds"] <= data["seconds"] + 0.002
    fields = ("exit_code", "forbidden", "rank", "pid", "name", "config", "uses")
    assert [first[name] for name in fields] == [
        0,
        False,
        -1,
        ran.pid,
        "sm90_fp8_gemm_1d2d",
        config_of(SMALL.kernel),
        None,
    ]
    assert [second[name] for name in fields] == [97, True, 3, ran.pid, "unknown", {}, None]


def test_compile_record_names_the_requesting_command(room: Path, fake_nvcc: Path) -> None:
    command = server(room, "compile=../small.cu", "port=8000", r"a\nb", "two\nlines")
    ran = run(room, fake_nvcc, command, "--json", "out.json")
    (compiled,) = json.loads((room / "out.json").read_text())["compiles"]
    assert compiled["command"] == " ".join(command).replace("\n", " ")
    assert f"pid {ran.pid} ({Path(sys.executable).name})" in ran.err[0]


def test_invalid_rank_variable_is_recorded_as_minus_1(room: Path, fake_nvcc: Path) -> None:
    steps = [
        "compile=../small.cu",
        "rank=first",
        "compile=../middle.cu",
        "rank=-2",
        "compile=../middle.cu",
    ]
    ran = run(room, fake_nvcc, server(room, *steps), "--json", "out.json")
    assert ran.code == 0
    compiles = json.loads((room / "out.json").read_text())["compiles"]
    assert [item["rank"] for item in compiles] == [-1, -1, -1]


def test_nested_watch_records_the_server_as_requester(room: Path, fake_nvcc: Path) -> None:
    """The inner watch's shim starts the outer one; neither counts as the requester."""
    inner = [*RUNNER, "--", *server(room, "compile=../small.cu")]
    ran = run(room, fake_nvcc, inner, "--json", "out.json")
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])
    (compiled,) = json.loads((room / "out.json").read_text())["compiles"]
    assert compiled["pid"] == ran.pid
    assert [reports(line, SMALL_WORDS) for line in ran.err].count(True) == 2


def test_command_line_that_is_not_utf_8_is_accepted(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, [*server(room, "compile=../small.cu"), b"\xff"])
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])
    assert summary(ran.err[-1], 1, 1, ", pid .*")


# Forbidding


def test_forbid_after_0_refuses_every_compile(room: Path, fake_nvcc: Path) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), "--forbid-after", "0")
    assert ran.code == 1
    assert ran.compiles == ["compile 97 a DeepGEMM compile is forbidden by now: DIR/kernel.cu"]
    assert reports(ran.err[0], SMALL_WORDS, outcome="FORBIDDEN")
    assert summary(ran.err[1], 0, 0, r", 1 forbidden, pid .*: 1")
    assert ran.err[2:] == ["error: 1 compiles after they were forbidden; the command ended with 0"]
    assert list(room.rglob("kernel.cubin")) == []


def test_forbid_after_file_refuses_compiles_once_it_exists(room: Path, fake_nvcc: Path) -> None:
    steps = ["compile=../small.cu", "touch=ready", "compile=../middle.cu", "exit=4"]
    ran = run(room, fake_nvcc, server(room, *steps), "--forbid-after", "ready")
    assert ran.code == 1
    assert [line[:10] for line in ran.compiles] == ["compile 0 ", "compile 97"]
    assert reports(ran.err[0], SMALL_WORDS)
    assert reports(ran.err[1], MIDDLE_WORDS, outcome="FORBIDDEN")
    assert summary(ran.err[2], 1, 1, r", 1 forbidden, pid .*: 2")
    assert ran.err[3:] == ["error: 1 compiles after they were forbidden; the command ended with 4"]


@pytest.mark.parametrize("after", ["ready", "9999"])
def test_command_that_ends_before_compiles_are_forbidden_proves_nothing(
    room: Path, fake_nvcc: Path, after: str
) -> None:
    ran = run(room, fake_nvcc, server(room, "compile=../small.cu"), "--forbid-after", after)
    assert (ran.code, ran.compiles) == (1, ["compile 0 "])
    assert ran.err[2:] == [
        f"error: --forbid-after {after}: the command ended before that, so nothing was forbidden"
    ]
    assert not (room / "ready").exists()


def test_exit_code_is_0_if_nothing_compiles_after_the_file_appears(
    room: Path, fake_nvcc: Path
) -> None:
    ran = run(
        room, fake_nvcc, server(room, "compile=../small.cu", "touch=x"), "--forbid-after", "x"
    )
    assert (ran.code, ran.compiles) == (0, ["compile 0 "])


def test_forbid_after_seconds_refuses_later_compiles(room: Path, fake_nvcc: Path) -> None:
    """The server waits for watch's own flag file, so a slow machine does not matter."""
    flag = room / "work" / "forbidden"
    steps = ["compile=../small.cu", f"await={flag}", "compile=../middle.cu"]
    done = watched(room, fake_nvcc, *steps, forbid_after=0.3)
    assert [record.exit_code for record in done.records][-1] == FORBIDDEN_EXIT
    assert [record.source for record in done.records] == [
        SMALL.kernel.body,
        MIDDLE.kernel.body,
    ]
    assert done.forbidden[-1] == done.records[-1]


def test_forbid_after_seconds_not_yet_reached_refuses_nothing(room: Path, fake_nvcc: Path) -> None:
    done = watched(room, fake_nvcc, "compile=../small.cu", forbid_after=3600.0)
    assert (done.forbidden, len(done.compiled)) == ([], 1)


# Records


def test_on_compile_is_called_once_per_compile_with_its_start(room: Path, fake_nvcc: Path) -> None:
    seen: list[tuple[CompileRecord, float]] = []
    done = watched(
        room,
        fake_nvcc,
        "compile=../small.cu",
        "compile=../broken.cu",
        "exit=3",
        on_compile=lambda record, seconds: seen.append((record, seconds)),
    )
    assert [record for record, _ in seen] == done.records
    assert [seconds for _, seconds in seen] == [
        record.start - done.started for record in done.records
    ]
    assert [record.exit_code for record in done.records] == [0, 3]
    assert [record.source for record in done.records] == [SMALL.kernel.body, "broken\n"]
    assert done.exit_code == 3
    assert (done.unfinished, done.forbidden, done.compiled) == ([], [], done.records)
    for record in done.records:
        assert done.started <= record.start <= record.end <= done.started + done.seconds


def killing_nvcc(tmp_path: Path, victim: str) -> Path:
    path = tmp_path / "killing-nvcc"
    path.write_text(f"#!/bin/sh\nkill -9 {victim}\n")
    path.chmod(0o755)
    return path


def test_killed_compile_is_recorded_as_never_ended(room: Path, tmp_path: Path) -> None:
    nvcc = killing_nvcc(tmp_path, "$PPID")
    ran = run(room, nvcc, server(room, "compile=../small.cu"), "--json", "out.json")
    assert ran.code == 0
    assert len(ran.err) == 1 and summary(ran.err[0], 0, 0, ", 1 never ended")
    (only,) = json.loads((room / "out.json").read_text())["compiles"]
    assert [only[name] for name in ("seconds", "exit_code", "forbidden", "pid", "name")] == [
        None,
        None,
        False,
        ran.pid,
        "sm90_fp8_gemm_1d2d",
    ]
    assert only["start"] >= 0


def test_killed_nvcc_is_recorded_as_failed_compile(room: Path, tmp_path: Path) -> None:
    nvcc = killing_nvcc(tmp_path, "$$")
    ran = run(room, nvcc, server(room, "compile=../small.cu"))
    assert reports(ran.err[0], SMALL_WORDS, outcome=rf"{TIME}, failed with 137")
    assert ran.compiles[0].startswith("compile 137")


def test_report_says_which_m_of_the_plan_a_kernel_serves(
    room: Path, fake_nvcc: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    keys = keys_for(small_library(tmp_path / "deep_gemm"))
    plan.write_text(json.dumps({**plan_to_json(small_plan(max_m=20), keys), "for": "x"}))
    other = ITEMS[((33, 64),)]
    (tmp_path / "other.cu").write_text(other.kernel.body)
    steps = ["compile=../middle.cu", "compile=../other.cu", "compile=../broken.cu"]
    ran = run(room, fake_nvcc, server(room, *steps), "--plan", str(plan), "--json", "out.json")
    assert reports(ran.err[0], MIDDLE_WORDS, serves="; gemm_nt_f8f8bf16:4096:1024 M 17..20")
    words = MIDDLE_WORDS.replace("32x32", "64x32")
    assert reports(ran.err[1], words, serves="; not in the plan")
    assert reports(
        ran.err[2], "unknown ()", outcome=f"{TIME}, failed with 3", serves="; not in the plan"
    )
    compiles = json.loads((room / "out.json").read_text())["compiles"]
    assert [[use["m_ranges"] for use in item["uses"]] for item in compiles] == [
        [[[17, 20]]],
        [],
        [],
    ]
