"""nvcc's stages read from its dry run, and PTX split into one module per kernel entry."""

from pathlib import Path

import pytest

from runner.build.stages import StageError, Stages, UnusualError, find_stages, split_ptx
from tests.unit.builder_jobs import NO_COMMAND

FLAGS = ("-std=c++20", "-Iwhere")


def dry_nvcc(tmp_path: Path, to_ptx: str, to_cubin: str) -> Path:
    """A script that prints the given dry runs; $T stands for its temporary folder."""
    path = tmp_path / "dry-nvcc"
    path.write_text(
        f'#!/bin/sh\necho "$*" >>"{tmp_path}/asked"\nT=$TMPDIR O=$4\n'
        f'if [ "$2" = -ptx ]; then cat >&2 <<END\n{to_ptx}\nEND\nelse cat >&2 <<END\n{to_cubin}\n'
        "END\nfi\n"
    )
    path.chmod(0o755)
    return path


PREPROCESS = '#\\$ gcc -E -DA="a b" "kernel.cu" -o "$T/t-7.ii"'
FRONT_END = '#\\$ "\\$TOP/cicc" --c++20 "$T/t-7.ii" -o "$O"'
ASSEMBLE = '#\\$ ptxas -arch=sm_90a "$T/t-6.ptx" -o "$O"'
TO_PTX = f"nvcc says hello\n#\\$ _SPACE_= \n#\\$ TOP=/opt/cuda/bin\n{PREPROCESS}\n{FRONT_END}"
TO_CUBIN = f"#\\$ TOP=/elsewhere\n{PREPROCESS}\n{ASSEMBLE}"


def test_find_stages_parses_nvcc_dryrun(tmp_path: Path) -> None:
    nvcc = dry_nvcc(tmp_path, TO_PTX, TO_CUBIN)
    stages = find_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin", "A": "1"})
    folder = str(tmp_path / "scratch" / "stages")
    assert stages == Stages(
        folder=folder,
        preprocess=("gcc", "-E", "-DA=a b", "kernel.cu", "-o", f"{folder}/t-7.ii"),
        front_end=(
            "/opt/cuda/bin/cicc",
            "--c++20",
            f"{folder}/t-7.ii",
            "-o",
            f"{folder}/kernel.ptx",
        ),
        assemble=(
            "ptxas",
            "-arch=sm_90a",
            f"{folder}/kernel.ptx",
            "-o",
            f"{folder}/kernel.cubin",
        ),
        preprocessed="t-7.ii",
        environment={"PATH": "/bin:/usr/bin", "A": "1", "_SPACE_": " ", "TOP": "/opt/cuda/bin"},
    )
    assert (tmp_path / "asked").read_text().splitlines() == [
        f"{folder}/kernel.cu -{kind} -o {folder}/kernel.{kind} -std=c++20 -Iwhere --dryrun"
        for kind in ("ptx", "cubin")
    ]


@pytest.mark.parametrize("flag", ["-lineinfo", "-G", "-g"])
def test_find_stages_refuses_debug_line_flags(tmp_path: Path, flag: str) -> None:
    nvcc = dry_nvcc(tmp_path, TO_PTX, TO_CUBIN)
    with pytest.raises(UnusualError, match=r"^the flags keep line numbers$"):
        find_stages(nvcc, ("-std=c++20", flag), tmp_path / "scratch", {})
    assert not (tmp_path / "asked").exists()


OTHER_FRONT_END = "cicc does not read the preprocessed file, or writes elsewhere"
OTHER_ASSEMBLER = "ptxas does not read PTX, or writes elsewhere"


@pytest.mark.parametrize(
    ("to_ptx", "to_cubin", "message"),
    [
        ("", "", NO_COMMAND),
        (TO_PTX.replace("#", "%"), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace(FRONT_END, ""), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace("cicc", "clang"), TO_CUBIN, NO_COMMAND),
        (TO_PTX.replace("-E", "-c"), TO_CUBIN, NO_COMMAND),
        (TO_PTX, TO_CUBIN.replace("ptxas", "as"), NO_COMMAND),
        (f"{TO_PTX}\n{FRONT_END}", TO_CUBIN, "nvcc has 2 commands where one was expected"),
        (TO_PTX.replace('-7.ii" -o "$O', '-8.ii" -o "$O'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX.replace('-o "$O"', '-o "$T/else.ptx"'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX.replace('-o "$O"', '-o "$O" -v'), TO_CUBIN, OTHER_FRONT_END),
        (TO_PTX, TO_CUBIN.replace(".ptx", ".ltoir"), OTHER_ASSEMBLER),
        (TO_PTX, TO_CUBIN.replace('-o "$O"', "-o a.cubin"), OTHER_ASSEMBLER),
    ],
)
def test_find_stages_refuses_unexpected_dryrun_commands(
    tmp_path: Path, to_ptx: str, to_cubin: str, message: str
) -> None:
    nvcc = dry_nvcc(tmp_path, to_ptx, to_cubin)
    with pytest.raises(UnusualError) as caught:
        find_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin"})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "to_ptx",
    [TO_PTX.replace('-o "$T/t-7.ii"', ""), TO_PTX.replace('"$T/t-7.ii" -o', '"$T/t-7.ii -o')],
    ids=["no output", "a quote that does not end"],
)
def test_find_stages_refuses_unparsable_dryrun_commands(tmp_path: Path, to_ptx: str) -> None:
    nvcc = dry_nvcc(tmp_path, to_ptx, TO_CUBIN)
    with pytest.raises(UnusualError, match=r"^nvcc --dryrun cannot be read: "):
        find_stages(nvcc, FLAGS, tmp_path / "scratch", {"PATH": "/bin:/usr/bin"})


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'unknown option --dryrun' >&2; exit 1", "unknown option --dryrun"),
        ("exit 4", "exit 4"),
    ],
)
def test_find_stages_reports_failed_dryrun(tmp_path: Path, script: str, words: str) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    with pytest.raises(UnusualError, match=rf"^nvcc --dryrun: {words}$"):
        find_stages(nvcc, FLAGS, tmp_path / "scratch", {})


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo out; echo err >&2; exit 3", "tool: err"),
        ("echo out; exit 3", "tool: out"),
        ("exit 3", "tool: exit 3"),
    ],
)
def test_stage_runs_in_given_folder_and_raises_its_own_output(
    tmp_path: Path, script: str, words: str
) -> None:
    tool, here = tmp_path / "tool", tmp_path / "here"
    here.mkdir()
    tool.write_text(
        f'#!/bin/sh\npwd -P >"$1"; echo "$WHO" >>"$1"\n[ "$2" = ok ] && exit 0\n{script}\n'
    )
    tool.chmod(0o755)
    command = (str(tool), "/made/for/out", "ok")
    stages = Stages("/made/for", command, (), (), "", {"WHO": "me"})
    stages.run(command, here)
    assert (here / "out").read_text() == f"{here.resolve()}\nme\n"
    with pytest.raises(StageError) as caught:
        stages.run(command[:2], here)
    assert str(caught.value) == words


# PTX

PTX_HEAD = "//\n// Generated\n//\n\n.version 9.0\n.target sm_90a\n.address_size 64\n"


def entry_text(name: str, *body: str) -> str:
    lines = "".join(f"\t{line}\n" for line in body)
    return f".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n{{\n{lines}\tret;\n\n}}\n"


def test_split_ptx_gives_each_entry_the_declarations_it_uses() -> None:
    shared = ".extern .shared .align 1024 .b8 smem[];\n"
    first, second = entry_text("one", "mov %r, smem;"), entry_text("two", "mov %r, own;")
    text = (
        f"{PTX_HEAD}{shared}.shared .align 8 .b8 own[16];\n.global .align 1 .b8 unused[4];\n\n"
        f"{first}\n{second.replace('.visible', '.weak')}"
    )
    assert split_ptx(text) == {
        "one": (f"{PTX_HEAD}{shared}.global .align 1 .b8 unused[4];\n\n\n{first}\n"),
        "two": (
            f"{PTX_HEAD}.shared .align 8 .b8 own[16];\n.global .align 1 .b8 unused[4];\n"
            f"\n\n{second.replace('.visible', '.weak')}"
        ),
    }


def test_split_ptx_of_a_single_entry_keeps_the_whole_text() -> None:
    text = (
        f"{PTX_HEAD}.extern .shared .align 16 .b8 smem[];\n\n{entry_text('one', 'mov %r, smem;')}"
    )
    (module,) = split_ptx(text).values()
    assert module.split() == text.split()


def test_split_ptx_does_not_confuse_names_with_a_common_prefix() -> None:
    head = f"{PTX_HEAD}.shared .b8 s[4];\n.shared .b8 s2[4];\n"
    modules = split_ptx(
        f"{head}{entry_text('one', 'mov %r, s;')}{entry_text('two', 'mov %r, s2;')}"
    )
    assert ".b8 s[4]" not in modules["two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PTX_HEAD, "PTX without an entry"),
        (f"{PTX_HEAD}.func f()\n{{\n\tret;\n}}\n", "PTX without an entry"),
        (
            f"{PTX_HEAD}{entry_text('one')}.func f()\n{{\n\tret;\n}}\n",
            "PTX with unknown parts",
        ),
        (
            f"{PTX_HEAD}{entry_text('one')}.visible .func f()\n{{\n\tret;\n}}\n{entry_text('two')}",
            "PTX with unknown parts",
        ),
        (f"{PTX_HEAD}{entry_text('one', 'call f;')}", "PTX with unknown parts"),
        (f"{PTX_HEAD}{entry_text('one', '.loc 1 2 3')}", "PTX with unknown parts"),
        (f'{PTX_HEAD}{entry_text("one")}.file 1 "k.cu"\n', "PTX with unknown parts"),
        (f"{PTX_HEAD}{entry_text('one')}.section .debug\n{{\n}}\n", "PTX with unknown parts"),
        (f"{PTX_HEAD}{entry_text('one')}// the end\n", "PTX with unknown parts"),
        (f"{PTX_HEAD}{entry_text('one')[:-3]}", "PTX with unknown parts"),
        (f"{PTX_HEAD}{entry_text('one')}{entry_text('one')}", "PTX with two entries of one name"),
        (
            f"{PTX_HEAD}.global .align 1 .b8 str[3] = {{72, 105, 0}};\n{entry_text('one')}",
            "PTX with '.global .align 1 .b8 str[3] = {72, 105, 0};' before its first entry",
        ),
        (
            f"{PTX_HEAD}.const .b8 c[3];\n{entry_text('one')}",
            "PTX with '.const .b8 c[3];' before its first entry",
        ),
        (
            f"{PTX_HEAD}.extern .func vprintf\n{entry_text('one')}",
            "PTX with '.extern .func vprintf' before its first entry",
        ),
    ],
)
def test_split_ptx_refuses_unsupported_ptx(text: str, message: str) -> None:
    with pytest.raises(UnusualError) as caught:
        split_ptx(text)
    assert str(caught.value) == message
