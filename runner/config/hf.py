"""Model configurations by name or from a Hugging Face ``config.json``, without transformers.

The fields of our configurations have the names of the published files, so a file is read field by
field. A field without a default here is required; anything else in the file is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from runner.config.fields import field_types, read_plain
from runner.config.model import Dsv3Config, Dsv4Config, ModelConfig, MoeConfig
from runner.config.presets import PRESETS
from runner.errors import UserError
from runner.files import parse_json

M = TypeVar("M", bound=ModelConfig)

_FAMILIES: dict[str, type[ModelConfig]] = {"deepseek_v3": Dsv3Config, "deepseek_v4": Dsv4Config}
_ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "DeepseekV3ForCausalLM": Dsv3Config,
    "DeepseekV4ForCausalLM": Dsv4Config,
}

_MAY_BE_ZERO = ("num_hash_layers", "first_k_dense_replace", "compress_ratios", "swiglu_limit")


def load_model(name_or_path: str) -> ModelConfig:
    """Load a preset by name, or the model of a ``config.json`` (the file or its directory).

    A loaded model is named after its directory, or after its file if that is not ``config.json``.

    Raises:
        UserError: no such preset or file, or a file that describes no known model.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    path, data = _read_object(name_or_path)
    name = path.absolute().parent.name if path.name == "config.json" else path.stem
    try:
        return from_hf(data, name or path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def from_hf(data: Mapping[str, Any], name: str) -> ModelConfig:
    """Make the model ``name`` from the contents of a ``config.json``.

    Raises:
        UserError: an unknown model type, a missing field, or a value that cannot be used.
    """
    cls = _family(data)
    values, moe = _read_fields(cls, data), _read_fields(MoeConfig, data)
    if cls is Dsv4Config:
        moe.setdefault("scoring_func", "sqrtsoftplus")
        # Entries beyond the last layer belong to the next-token-prediction modules.
        values["compress_ratios"] = values["compress_ratios"][: values["num_hidden_layers"]]
    return cls(name=name, moe=MoeConfig(**moe), **values)


def with_layers(model: M, n: int) -> M:
    """Cut a model to its first ``n`` layers.

    Raises:
        UserError: ``n`` is not in 1..num_hidden_layers.
    """
    if not 1 <= n <= model.num_hidden_layers:
        raise UserError(f"layers={n} of {model.name} must lie in 1..{model.num_hidden_layers}")
    if isinstance(model, Dsv4Config):
        return replace(model, num_hidden_layers=n, compress_ratios=model.compress_ratios[:n])
    return replace(model, num_hidden_layers=n)


def _read_object(name_or_path: str) -> tuple[Path, dict[str, Any]]:
    given = Path(name_or_path)
    path = given
    try:
        if given.is_dir():
            path = given / "config.json"
        content = path.read_bytes()
    except FileNotFoundError:
        if path is not given:
            raise UserError(f"{given} holds no config.json") from None
        raise UserError(
            f"model {name_or_path!r} is not known: use one of {', '.join(PRESETS)}, "
            "or a path to a config.json"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {_show(data)}: a JSON object is needed")
    return path, data


def _family(data: Mapping[str, Any]) -> type[ModelConfig]:
    named, architectures = data.get("model_type"), data.get("architectures")
    for name in [named, *(architectures if isinstance(architectures, list) else [])]:
        if isinstance(name, str) and name in _FAMILIES | _ARCHITECTURES:
            return (_FAMILIES | _ARCHITECTURES)[name]
    raise UserError(f"model_type {_show(named)} is not known: use {' or '.join(_FAMILIES)}")


def _read_fields(cls: type[ModelConfig | MoeConfig], data: Mapping[str, Any]) -> dict[str, Any]:
    """Values in ``data`` for the fields of ``cls``; null means the default, if there is one."""
    values, kinds = {}, field_types(cls)
    for item in fields(cls):
        if item.name in ("name", "moe"):
            continue
        has_default = item.default is not MISSING
        if has_default and data.get(item.name) is None:
            continue
        if item.name not in data:
            raise UserError(f"field {item.name} is missing")
        try:
            zero = item.name in _MAY_BE_ZERO
            values[item.name] = read_plain(kinds[item.name], item.name, data, zero=zero)
        except ValueError as error:
            raise UserError(str(error)) from None
    return values


def _show(value: object) -> str:
    """``value`` as JSON on one line, cut short if long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
