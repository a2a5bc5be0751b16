"""PTX: split by entry, or refused."""

import pytest

from runner.build.ptx import split_ptx
from runner.build.stages import UnusualError

PTX_HEAD = "//\n// Generated\n//\n\n.version 9.0\n.target sm_90a\n.address_size 64\n"


def entry_text(name: str, *body: str) -> str:
    lines = "".join(f"\t{line}\n" for line in body)
    return f".visible .entry {name}(\n\t.param .u64 {name}_param_0\n)\n{{\n{lines}\tret;\n\n}}\n"


def test_ptx_is_split_by_entry() -> None:
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


def test_a_single_entry_is_the_whole_text() -> None:
    text = (
        f"{PTX_HEAD}.extern .shared .align 16 .b8 smem[];\n\n{entry_text('one', 'mov %r, smem;')}"
    )
    (module,) = split_ptx(text).values()
    assert module.split() == text.split()


def test_a_declaration_whose_name_begins_anothers() -> None:
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
            "PTX with more than entries",
        ),
        (
            f"{PTX_HEAD}{entry_text('one')}.visible .func f()\n{{\n\tret;\n}}\n{entry_text('two')}",
            "PTX with more than entries",
        ),
        (f"{PTX_HEAD}{entry_text('one', 'call f;')}", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one', '.loc 1 2 3')}", "PTX with more than entries"),
        (f'{PTX_HEAD}{entry_text("one")}.file 1 "k.cu"\n', "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}.section .debug\n{{\n}}\n", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')}// the end\n", "PTX with more than entries"),
        (f"{PTX_HEAD}{entry_text('one')[:-3]}", "PTX with more than entries"),
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
def test_ptx_with_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UnusualError) as caught:
        split_ptx(text)
    assert str(caught.value) == message
