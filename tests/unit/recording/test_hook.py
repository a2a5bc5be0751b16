"""The hook in a server's processes, around a library that only looks like DeepGEMM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runner.recording.hook
from runner.recording.events import ProcessRecord, read_processes

SITE = Path(runner.recording.hook.__file__).parent / "site"

LIBRARY = '''
import os

class Device:
    type = "cuda"

class Tensor:
    device = Device()
    def __init__(self, *shape, strides=None):
        self.dtype, self.shape = "torch.bfloat16", shape
        self.strides = strides
    def stride(self):
        return self.strides or self.shape
    def is_contiguous(self):
        return self.strides is None

class Broken:
    dtype, shape = "torch.bfloat16", (1, 2)
    def stride(self):
        raise RuntimeError("no strides today")

def bf16_gemm_nt(a, b, d, c=None):
    """A GEMM."""
    path = os.path.join(os.environ["DG_JIT_CACHE_DIR"], "cache", f"kernel.{a.shape[0] // 64}")
    os.makedirs(path, exist_ok=True)
    return "done"

def set_num_sms(count):
    pass

def get_num_sms():
    return 132

def fails(a):
    raise ValueError("bad shape")

def outer(a):
    return bf16_gemm_nt(a, a, a)
'''


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A folder in which ``run`` finds the library and leaves the records."""
    package = tmp_path / "deep_gemm"
    package.mkdir()
    (package / "__init__.py").write_text(LIBRARY)
    (tmp_path / "records").mkdir()
    return tmp_path


def start(server: Path, code: str, **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SITE}:{server}",
        "DEEPGEMM_RECORD": str(server / "records"),
        "DG_JIT_CACHE_DIR": str(server / "jit"),
        **variables,
    }
    head = "import deep_gemm\nfrom deep_gemm import Tensor, bf16_gemm_nt\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(server: Path, code: str, **variables: str) -> tuple[str, str]:
    child = start(server, code, **variables)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out, err


def record(server: Path) -> ProcessRecord:
    (found,) = read_processes(server / "records")
    return found


GEMM = "a, b = Tensor(m, 128), Tensor(256, 128); bf16_gemm_nt(a, b, Tensor(m, 256))\n"


def test_distinct_calls_are_noted_once_and_counted(server: Path) -> None:
    run(server, f"for m in (1, 1, 70, 1):\n    {GEMM}")
    found = record(server)
    assert found.libraries == [("deep_gemm", str(server / "deep_gemm" / "__init__.py"))]
    assert [(c.function, c.args[0]["shape"], c.count) for c in found.calls] == [
        ("bf16_gemm_nt", [1, 128], 3),
        ("bf16_gemm_nt", [70, 128], 1),
    ]
    assert [call.entries for call in found.calls] == [["kernel.0"], ["kernel.1"]]
    assert found.calls[0].by[0].endswith("<string>:4:<module>")
    assert found.stopped == ""


def test_strides_keywords_and_sms_are_noted(server: Path) -> None:
    run(
        server,
        "deep_gemm.set_num_sms(100)\n"
        "a = Tensor(4, 128, strides=(1, 4))\n"
        "bf16_gemm_nt(a, a, d=(a, 3), c=None)\n",
    )
    (call,) = record(server).calls
    described = {"dtype": "bfloat16", "shape": [4, 128], "stride": [1, 4]}
    assert (call.args, call.kwargs) == ([described] * 2, {"d": [described, 3], "c": None})
    assert call.num_sms == 100


def test_wrapped_functions_look_and_return_as_before(server: Path) -> None:
    out, _ = run(server, "m = 1\nprint(bf16_gemm_nt.__doc__, deep_gemm.get_num_sms())\n" + GEMM)
    assert out == "A GEMM. 132\n"


def test_calls_inside_a_recorded_call_are_not_noted(server: Path) -> None:
    run(server, "deep_gemm.outer(Tensor(3, 4))")
    assert [call.function for call in record(server).calls] == ["outer"]


def test_calls_without_tensors_are_not_noted(server: Path) -> None:
    run(server, "deep_gemm.get_num_sms()")
    assert record(server).calls == []


def test_errors_are_noted_and_raised(server: Path) -> None:
    run(
        server,
        "try:\n    deep_gemm.fails(Tensor(1, 2))\n"
        "except ValueError as error:\n    assert str(error) == 'bad shape'\n"
        "else:\n    raise SystemExit(3)",
    )
    assert [call.error for call in record(server).calls] == ["ValueError: bad shape"]


def test_recorder_that_fails_stops_and_lets_the_server_go_on(server: Path) -> None:
    _, err = run(
        server,
        "try:\n    deep_gemm.outer(deep_gemm.Broken())\n"
        "except AttributeError:\n    pass\n"
        f"m = 1\n{GEMM}",
    )
    assert "[runner record] recording stops in" in err and "no strides today" in err
    assert record(server).calls == []
    assert "no strides today" in record(server).stopped


def test_full_disk_stops_recording_alone(server: Path) -> None:
    (server / "records").rmdir()
    (server / "records").symlink_to("/dev/full")
    out, err = run(server, f"m = 1\n{GEMM}print('alive')")
    assert out == "alive\n"
    assert "[runner record]" in err


def test_records_survive_a_kill(server: Path) -> None:
    child = start(server, f"m = 5\n{GEMM}print('called', flush=True)\nimport time; time.sleep(60)")
    assert child.stdout is not None and child.stdout.readline() == "called\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert [call.args[0]["shape"] for call in record(server).calls] == [[5, 128]]


def test_forked_processes_record_for_themselves(server: Path) -> None:
    run(
        server,
        f"import os\nm = 1\n{GEMM}"
        f"pid = os.fork()\nif not pid:\n    m = 2\n    {GEMM}    os._exit(0)\n"
        "os.waitpid(pid, 0)\n",
    )
    parent, child = read_processes(server / "records")
    assert parent.pid != child.pid
    assert [call.args[0]["shape"][0] for call in parent.calls] == [1]
    assert [call.args[0]["shape"][0] for call in child.calls] == [2]


def test_phases_separate_equal_calls(server: Path) -> None:
    code = (
        f"import time\nm = 1\n{GEMM}"
        "path = __import__('os').environ['DEEPGEMM_RECORD'] + '/phase'\n"
        "open(path, 'w').write('ready')\ntime.sleep(0.3)\n"
        "def load_model():\n"
        f"    m = 1\n    {GEMM}    m = 2\n    {GEMM}load_model()\n"
    )
    run(server, code)
    assert [(c.phase, c.args[0]["shape"][0]) for c in record(server).calls] == [
        ("start", 1),
        ("ready", 1),
        ("ready", 2),
    ]


@pytest.mark.parametrize(
    ("function", "phase"),
    [("load_model", "load"), ("kernel_warmup", "warm-up"), ("capture_model", "capture")],
)
def test_phase_before_ready_is_on_the_stack(server: Path, function: str, phase: str) -> None:
    run(server, f"def {function}():\n    m = 1\n    {GEMM}{function}()\n")
    assert [call.phase for call in record(server).calls] == [phase]


def test_own_sitecustomize_still_runs(server: Path) -> None:
    (server / "sitecustomize.py").write_text("print('mine')")
    out, _ = run(server, "")
    assert out == "mine\n"


def test_process_without_the_library_leaves_nothing(server: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(SITE),
        "DEEPGEMM_RECORD": str(server / "records"),
    }
    subprocess.run([sys.executable, "-c", "import json"], env=environment, check=True)
    assert list((server / "records").iterdir()) == []


def test_looking_for_the_library_does_not_unhook_it(server: Path) -> None:
    code = f"m = 1\n{GEMM}"
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlib.util as u; assert u.find_spec('deep_gemm')\n"
            "import deep_gemm\nfrom deep_gemm import Tensor, bf16_gemm_nt\n" + code,
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{SITE}:{server}",
            "DEEPGEMM_RECORD": str(server / "records"),
            "DG_JIT_CACHE_DIR": str(server / "jit"),
        },
        check=True,
        timeout=60,
    )
    assert child.returncode == 0
    assert len(record(server).calls) == 1


def test_half_a_line_at_the_end_is_left_out(server: Path) -> None:
    run(server, f"m = 1\n{GEMM}")
    (path,) = (server / "records").iterdir()
    path.write_bytes(path.read_bytes() + b'{"event": "call", "numb')
    assert len(record(server).calls) == 1
    assert time.time() > record(server).calls[0].started


def test_counts_of_threads_that_make_the_same_first_call(server: Path) -> None:
    library = server / "deep_gemm" / "__init__.py"
    library.write_text(
        f"{LIBRARY}\nimport threading\nboth = threading.Barrier(2)\n"
        "def meet(a):\n    both.wait(30)\n"
    )
    run(
        server,
        "import threading\na = Tensor(3, 4)\n"
        "threads = [threading.Thread(target=deep_gemm.meet, args=(a,)) for _ in range(2)]\n"
        "for each in threads: each.start()\n"
        "for each in threads: each.join()\n"
        f"for m in (7, 7, 7):\n    {GEMM}",
    )
    counts = [(call.function, call.count) for call in record(server).calls]
    assert counts == [("meet", 1), ("meet", 1), ("bf16_gemm_nt", 3)]


def test_numbers_that_json_does_not_have_are_words(server: Path) -> None:
    run(server, "bf16_gemm_nt(Tensor(1, 2), float('inf'), [float('nan'), 0.5])")
    (call,) = record(server).calls
    assert call.args[1:] == [{"object": "inf"}, [{"object": "nan"}, 0.5]]
