"""Loading models by preset name and from config.json."""

import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.config.hf import from_hf, load_model, with_layers
from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig, MoeConfig
from runner.config.presets import DSV3, DSV4, PRESETS
from runner.errors import UserError


def hf_of(model: ModelConfig) -> dict[str, Any]:
    """A config.json as published: flat, with additional unknown fields."""
    values = {**asdict(model), **asdict(model.moe)}
    del values["name"], values["moe"]
    if isinstance(model, Dsv4Config):
        values.update(
            model_type="deepseek_v4",
            architectures=["DeepseekV4ForCausalLM"],
            compress_ratios=[*model.compress_ratios, 0],
            num_nextn_predict_layers=1,
            rope_scaling={"type": "yarn", "factor": 16},
            topk_method="noaux_tc",
        )
        del values["n_group"], values["topk_group"]
    else:
        values.update(model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
    return values


def write(path: Path, data: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return str(path)


def message_of(name_or_path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(name_or_path))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", PRESETS)
def test_load_model_accepts_preset_names(name: str) -> None:
    assert load_model(name) is PRESETS[name]


@pytest.mark.parametrize("model", PRESETS.values(), ids=PRESETS)
def test_published_config_gives_the_same_model_as_the_preset(model: ModelConfig) -> None:
    assert from_hf(hf_of(model), model.name) == model


def test_model_is_named_after_its_folder_or_file(tmp_path: Path) -> None:
    data = hf_of(DSV4)
    write(tmp_path / "DeepSeek-V4.1" / "config.json", data)
    assert load_model(str(tmp_path / "DeepSeek-V4.1")).name == "DeepSeek-V4.1"
    assert load_model(str(tmp_path / "DeepSeek-V4.1" / "config.json")).name == "DeepSeek-V4.1"
    assert load_model(write(tmp_path / "flash.json", data)).name == "flash"


def test_load_model_accepts_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "v4" / "config.json", hf_of(DSV4))
    monkeypatch.chdir(tmp_path / "v4")
    assert load_model("config.json") == replace(DSV4, name="v4")
    assert load_model(".") == replace(DSV4, name="v4")


def test_surplus_compress_ratios_are_ignored() -> None:
    data = {**hf_of(DSV4), "compress_ratios": list(DSV4.compress_ratios)}
    assert from_hf(data, "dsv4") == DSV4
    data["compress_ratios"] += [0, 0, 0]
    assert from_hf(data, "dsv4") == DSV4


def test_absent_and_null_fields_have_defaults() -> None:
    data = hf_of(DSV4)
    for name in ("hc_eps", "hc_mult", "scoring_func", "norm_topk_prob", "compress_rope_theta"):
        del data[name]
    assert from_hf(data, "dsv4") == DSV4
    assert from_hf({**data, "scoring_func": None, "hc_mult": None}, "dsv4") == DSV4
    v3 = hf_of(DSV3)
    del v3["scoring_func"]
    assert from_hf(v3, "dsv3").moe.scoring_func == "sigmoid"


def test_values_in_the_file_override_defaults() -> None:
    changed = {
        "hc_mult": 2,
        "hc_sinkhorn_iters": 5,
        "hc_eps": 1e-3,
        "rope_theta": 500,
        "compress_rope_theta": 40000,
        "sliding_window": 256,
        "num_hash_layers": 0,
        "rms_norm_eps": 1e-5,
    }
    experts = {
        "swiglu_limit": 7,
        "scoring_func": "sigmoid",
        "norm_topk_prob": False,
        "routed_scaling_factor": 3,
        "n_group": 8,
        "topk_group": 2,
    }
    model = from_hf({**hf_of(DSV4), **changed, **experts}, "x")
    assert model == replace(DSV4, name="x", moe=replace(DSV4.moe, **experts), **changed)
    assert isinstance(model.moe.swiglu_limit, float)


def test_family_is_taken_from_architectures_if_model_type_is_unknown() -> None:
    data = hf_of(DSV3)
    del data["model_type"]
    assert isinstance(from_hf(data, "x"), Dsv3Config)
    assert isinstance(from_hf({**hf_of(DSV4), "model_type": "custom"}, "x"), Dsv4Config)


@pytest.mark.parametrize("name", ["dsv5", "deepseek-ai/DeepSeek-V4-Flash", "missing/config.json"])
def test_unknown_preset_is_refused(name: str) -> None:
    assert message_of(name) == (
        f"model {name!r} is not known: use one of dsv4, dsv4-pro, dsv3, dsv4-tiny, "
        "or a path to a config.json"
    )


def test_directory_without_config_json_is_refused(tmp_path: Path) -> None:
    assert message_of(tmp_path) == f"{tmp_path} holds no config.json"


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    path = tmp_path / "config.json"
    assert message_of(tmp_path) == f"{path} cannot be read: Is a directory"
    below = Path(write(tmp_path / "file", {})) / "config.json"
    assert message_of(below) == f"{below} cannot be read: Not a directory"


def test_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{hidden_size: 1}")
    assert message_of(path).startswith(f"{path} is not JSON: Expecting property name")
    path.write_bytes(b"\xff\xfe\xff")
    assert message_of(path).startswith(f"{path} is not JSON: ")
    path.write_text("[" * 100_000)
    assert message_of(path).startswith(f"{path} is not JSON: ")


@pytest.mark.parametrize(
    ("data", "shown"),
    [([], "[]"), ("x", '"x"'), (None, "null"), ([0] * 99, "[" + "0, " * 18 + "0,...")],
)
def test_config_that_is_not_an_object_is_refused(tmp_path: Path, data: object, shown: str) -> None:
    path = write(tmp_path / "config.json", data)
    assert message_of(path) == f"{path} holds {shown}: a JSON object is needed"


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ({}, "null"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, '"llama"'),
        (
            {"model_type": ["deepseek_v4"], "architectures": "DeepseekV4ForCausalLM"},
            '["deepseek_v4"]',
        ),
        ({"model_type": "deepseek_v32", "architectures": [None, {}]}, '"deepseek_v32"'),
    ],
)
def test_unknown_model_type_is_refused(tmp_path: Path, data: dict[str, Any], shown: str) -> None:
    path = write(tmp_path / "config.json", data)
    assert message_of(path) == (
        f"{path}: model_type {shown} is not known: use deepseek_v3 or deepseek_v4"
    )


REQUIRED = [
    (model, field.name)
    for model in (DSV4, DSV3)
    for cls in (type(model), MoeConfig)
    for field in fields(cls)
    if field.default is MISSING and field.name not in ("name", "moe")
]


@pytest.mark.parametrize(("model", "field"), REQUIRED)
def test_missing_field_is_refused_and_named(tmp_path: Path, model: ModelConfig, field: str) -> None:
    data = hf_of(model)
    del data[field]
    path = write(tmp_path / "config.json", data)
    assert message_of(path) == f"{path}: field {field} is missing"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", "4096", "its 'hidden_size' is '4096', not a whole number from 1 on"),
        ("hidden_size", 4096.0, "its 'hidden_size' is 4096.0, not a whole number from 1 on"),
        ("hidden_size", True, "its 'hidden_size' is True, not a whole number from 1 on"),
        ("q_lora_rank", None, "its 'q_lora_rank' is None, not a whole number from 1 on"),
        ("o_groups", 0, "its 'o_groups' is 0, not a whole number from 1 on"),
        ("n_group", 0, "its 'n_group' is 0, not a whole number from 1 on"),
        ("num_hash_layers", -1, "its 'num_hash_layers' is -1, not a whole number from 0 on"),
        ("swiglu_limit", "10", "its 'swiglu_limit' is '10', not a number from 0 on"),
        ("hc_eps", float("nan"), "its 'hc_eps' is nan, not a number above 0"),
        ("rope_theta", False, "its 'rope_theta' is False, not a number above 0"),
        ("norm_topk_prob", 1, "its 'norm_topk_prob' is 1, not true or false"),
        ("scoring_func", 3, "its 'scoring_func' is 3, not a word"),
        ("compress_ratios", 4, "its 'compress_ratios' is 4, not a list"),
        ("compress_ratios", [0, "4"], "its 'compress_ratios' is '4', not a whole number from 0 on"),
        # Errors raised by the model configuration are prefixed with the file, too.
        ("hidden_size", 4100, "hidden_size=4100 must be a positive multiple of 128 (FP8 blocks)"),
        (
            "compress_ratios",
            [0, 4],
            "compress_ratios has 2 entries for num_hidden_layers=43: one per layer is needed",
        ),
    ],
)
def test_invalid_value_is_refused_and_named(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = write(tmp_path / "config.json", {**hf_of(DSV4), field: value})
    assert message_of(path) == f"{path}: {message}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.sampled_from(sorted(hf_of(DSV4))), json_values)
def test_any_value_of_any_field_loads_or_is_refused(field: str, value: object) -> None:
    try:
        model = from_hf({**hf_of(DSV4), field: value}, "x")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(model, Dsv4Config)


@given(st.sampled_from(sorted(PRESETS)), st.data())
def test_with_layers_keeps_the_first_layers(name: str, data: st.DataObject) -> None:
    model = PRESETS[name]
    n = data.draw(st.integers(1, model.num_hidden_layers))
    cut = with_layers(model, n)
    assert cut.num_hidden_layers == n
    if isinstance(model, Dsv4Config):
        assert isinstance(cut, Dsv4Config)
        assert cut.compress_ratios == model.compress_ratios[:n]
        restored: ModelConfig = replace(
            cut, num_hidden_layers=model.num_hidden_layers, compress_ratios=model.compress_ratios
        )
    else:
        restored = replace(cut, num_hidden_layers=model.num_hidden_layers)
    assert restored == model


@pytest.mark.parametrize("n", [-1, 0, 44])
def test_with_layers_refuses_invalid_numbers(n: int) -> None:
    with pytest.raises(UserError) as caught:
        with_layers(DSV4, n)
    assert str(caught.value) == f"layers={n} of dsv4 must lie in 1..43"
