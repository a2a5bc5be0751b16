"""Cache manifests: file format, invalid files, merging, targets, and removed entries."""

import json
import os
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.cache.kernel_cache import KernelCache, size_of
from runner.cache.manifest import (
    Entry,
    Manifest,
    check_target,
    manifest_text,
    merge_manifest,
    parse_manifest,
    read_manifest,
    remove_entries,
    write_manifest,
)
from runner.errors import UserError
from runner.kernels.installed import Library
from tests.unit.kept_cache import first_of, make_incomplete, one_line
from tests.unit.small_cache import (
    ENTRY_BYTES,
    contents,
    keys_for,
    manifest_for,
    second_keys_for,
    second_library,
    small_library,
)


def entries() -> st.SearchStrategy[Entry]:
    numbers = {name: st.integers() for name in ("n", "k", "num_groups")}
    pairs = st.lists(st.integers(), min_size=2, max_size=2)
    ranges = st.lists(pairs, min_size=1, max_size=2)
    uses = st.fixed_dictionaries({"type": st.text(), **numbers, "m_ranges": ranges})
    return st.builds(
        Entry, st.text(), st.lists(uses, max_size=2), st.text(), st.text(), st.integers()
    )


def manifests() -> st.SearchStrategy[Manifest]:
    return st.builds(
        Manifest,
        st.text(),
        st.text(),
        st.text(),
        st.text(),
        st.text(),
        generation=st.sampled_from([1, 2]),
        extra_signature=st.text(),
        gpu=st.text(),
        num_sms=st.integers(),
        plans=st.lists(st.text(), max_size=3),
        entries=st.dictionaries(st.text(), entries(), max_size=4),
    )


@settings(deadline=None)
@given(manifests())
def test_manifest_round_trips_through_its_file(manifest: Manifest) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_manifest(Path(name), manifest)
        assert read_manifest(Path(name)) == manifest
        assert os.listdir(name) == ["manifest.json"]  # noqa: PTH208


@settings(deadline=None)
@given(manifests(), st.randoms())
def test_manifest_text_does_not_depend_on_entry_order(manifest: Manifest, random: Any) -> None:
    order = list(manifest.entries)
    random.shuffle(order)
    shuffled = replace(manifest, entries={key: manifest.entries[key] for key in order})
    assert shuffled == manifest
    assert manifest_text(shuffled) == manifest_text(manifest)


def entry(name: str, *uses: dict[str, Any]) -> Entry:
    return Entry(name, list(uses), "s", "c", 1)


BASE = Manifest("lib", "sm_90a", "NVCC13.0", "-O3", "NVCC13.0")


def use(n: int, *m_ranges: list[int], stages: tuple[int, ...] = (0,)) -> dict[str, object]:
    return {
        "type": "gemm",
        "n": n,
        "k": 1,
        "num_groups": 1,
        "m_ranges": list(m_ranges),
        "stages": list(stages),
    }


def test_merged_keeps_newer_entries_and_unites_uses_and_plans() -> None:
    older = replace(
        BASE,
        plans=["a", "b"],
        entries={"k1": entry("x", use(1, [1, 4], [9, 9])), "k2": entry("y")},
    )
    newer = replace(
        BASE,
        plans=["b", "c"],
        built_with="NVCC13.1",
        entries={"k1": entry("z", use(1, [5, 6], stages=(1,)), use(2, [1, 1])), "k3": entry("w")},
    )
    both = [use(1, [1, 6], [9, 9], stages=(0, 1)), use(2, [1, 1])]
    assert older.merged(newer) == replace(
        BASE,
        plans=["a", "b", "c"],
        built_with="NVCC13.1",
        entries={"k1": entry("z", *both), "k2": entry("y"), "k3": entry("w")},
    )
    assert older.merged(older) == older
    assert list(older.entries) == ["k1", "k2"]


def test_merged_keeps_the_newer_compiler() -> None:
    newest = replace(BASE, built_with="NVCC13.10")
    assert newest.merged(BASE).built_with == BASE.merged(newest).built_with == "NVCC13.10"


def test_without_drops_the_given_entries() -> None:
    whole = replace(BASE, entries={"k1": entry("x"), "k2": entry("y")})
    assert whole.without({"k1", "k9"}) == replace(BASE, entries={"k2": entry("y")})
    assert whole.without(set()) == whole


@pytest.mark.parametrize(
    ("field", "same"),
    [
        ("library", False),
        ("arch", False),
        ("signature", False),
        ("flags", False),
        ("extra_signature", False),
        ("built_with", True),
        ("gpu", True),
    ],
)
def test_same_target_compares_key_fields_only(field: str, same: bool) -> None:
    assert BASE.same_target(replace(BASE, **{field: "other"})) is same


@pytest.mark.parametrize("path", ["/srv/deep_gemm/include", "/my libs/a -b/deep_gemm/include"])
def test_include_path_with_spaces_is_recovered_from_flags(tmp_path: Path, path: str) -> None:
    keys = keys_for(small_library(tmp_path), Path(path))
    manifest = manifest_for(keys)
    assert manifest.include_path == path
    assert manifest.recipe == keys.recipe
    assert manifest.keys(keys.headers) == keys
    assert (BASE.include_path, BASE.recipe.flags) == ("", ("-O3",))


def test_read_manifest_of_directory_without_one_is_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None


def broken(**values: Any) -> str:
    data = {"version": 1, **asdict(BASE), **values}
    return json.dumps({name: value for name, value in data.items() if value is not ...})


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param("[" * 200_000, id="deep"),
        "\xff",
        "[]",
        "3",
        "null",
        "{}",
        '{"entries": {}}',
        '{"entries": []}',
        broken(version=2),
        broken(version=...),
        broken(flags=...),
        broken(more=1),
        broken(entries={"k": {"name": "x"}}),
        broken(entries={"k": 3}),
        broken(entries={"k": {**asdict(entry("x")), "more": 1}}),
        broken(signature=13),
        broken(plans=3),
        broken(plans=[3]),
        broken(generation=3),
        broken(generation="1"),
        broken(extra_signature=1),
        broken(gpu=3),
        broken(num_sms="132"),
        broken(entries={"k": {**asdict(entry("x")), "cubin_bytes": "1"}}),
        broken(entries={"k": {**asdict(entry("x")), "uses": 3}}),
        broken(entries={"k": asdict(entry("x", {"n": 1}))}),
    ],
)
def test_invalid_manifest_is_a_one_line_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert one_line(caught).startswith(f"{tmp_path}/manifest.json is not a manifest: ")


def test_older_manifest_without_generation_is_read_as_generation_1() -> None:
    fields = ("generation", "extra_signature", "gpu", "num_sms")
    older = broken(**dict.fromkeys(fields, ...))
    assert all(name not in older for name in fields)
    assert parse_manifest(older.encode(), "there") == BASE
    assert (BASE.generation, BASE.extra_signature, BASE.gpu, BASE.num_sms) == (1, "", "", 0)


def test_manifest_reproduces_the_keys_it_was_made_with(tmp_path: Path) -> None:
    source = "#include <deep_gemm/impls/smxx_layout.cuh>\n"
    for library, keys in (
        ((first := small_library(tmp_path / "first")), keys_for(first)),
        ((second := second_library(tmp_path / "second")), second_keys_for(second)),
    ):
        again = manifest_for(keys).keys(library)
        assert again.key_of("gemm", source) == keys.key_of("gemm", source)
        assert (again.signature, again.flags) == (keys.signature, keys.flags)
        assert again.recipe.extra_signature == keys.recipe.extra_signature


def test_parse_manifest_error_names_the_given_origin() -> None:
    assert parse_manifest(manifest_text(BASE).encode(), "there") == BASE
    with pytest.raises(UserError, match=r"^there is not a manifest: "):
        parse_manifest(b"{}", "there")


def test_directory_named_manifest_json_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert one_line(caught) == f"cannot read {tmp_path}/manifest.json: Is a directory"


def test_merge_manifest_writes_the_merged_manifest(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    _, manifest = made
    key, _ = first_of(made)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert merge_manifest(empty, manifest.without({key})) == manifest.without({key})
    merged = merge_manifest(empty, replace(manifest, plans=["more"]))
    assert merged == replace(manifest, plans=["small", "more"])
    assert read_manifest(empty) == merged


def test_merge_refuses_manifest_for_a_different_machine(
    made: tuple[KernelCache, Manifest], here: Library
) -> None:
    cache, manifest = made
    other = manifest_for(keys_for(here, signature="NVCC13.1"))
    for refuse in (merge_manifest, check_target):
        with pytest.raises(UserError) as caught:
            refuse(cache.root, other)
        assert one_line(caught) == (
            f"{cache.root} was built for another machine (sgl-deep-gemm 0.1.4.post1, sm_90a, "
            "or another compiler, flags or path): use another directory"
        )
    assert read_manifest(cache.root) == manifest
    check_target(cache.root, manifest)
    check_target(cache.root / "nowhere", other)
    write_manifest(cache.root, manifest.without(set(manifest.entries)))
    check_target(cache.root, other)
    assert merge_manifest(cache.root, other) == other


def test_remove_entries_deletes_files_and_manifest_entries(
    made: tuple[KernelCache, Manifest],
) -> None:
    cache, manifest = made
    half, gone, *kept = sorted(manifest.entries)
    make_incomplete(cache.entry(half))
    freed = sum(size_of(cache.entry(key)) for key in (half, gone))
    assert remove_entries(cache, [cache.entry(half), cache.entry(gone)]) == freed
    assert [path.name for path in cache.entries()] == kept
    assert read_manifest(cache.root) == manifest.without({half, gone})
    assert list((cache.root / "tmp").iterdir()) == []


def test_remove_entries_keeps_the_target_of_a_symlink(
    made: tuple[KernelCache, Manifest], tmp_path: Path
) -> None:
    cache, _ = made
    (cache.root / "manifest.json").unlink()
    _, path = first_of(made)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert remove_entries(cache, cache.entries()) == 4 * ENTRY_BYTES
    assert contents(cache.root) == {}
    assert sorted(contents(tmp_path / "elsewhere")) == ["kernel.cu", "kernel.cubin"]
