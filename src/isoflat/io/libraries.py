"""Networks of libraries, by name: `hf:FOLDER` and `timm:NAME`. Nothing is downloaded, and no code in a folder is run."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from isoflat.core.errors import CheckpointError, UsageError
from isoflat.core.render import some
from isoflat.io.named import reason
from isoflat.io.strict import parse_json
from isoflat.io.weights import read_weights

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files in which `save_pretrained` keeps the weights, in the order they are looked for."""


def library(spec: str) -> Callable[[], nn.Module] | None:
    """The function that builds a library's network, whose random numbers are torch's; None where a name is none of these.

    Args:
        spec: `hf:FOLDER`, `timm:NAME` or `timm:NAME,argument=value`.

    Raises:
        UsageError: the library is not installed, or has no such network.
    """
    if spec.startswith("timm:"):
        return _timm(spec)
    if _names_folder(spec):
        return lambda: _hugging_face(spec)
    return None


def own_weights(spec: str) -> Path | None:
    """The file of weights that a network is built with; None where they are random."""
    return _weights_in(Path(spec.partition(":")[2])) if _names_folder(spec) else None


def _names_folder(spec: str) -> bool:
    """True for `hf:FOLDER`, unless the user has a module of that name."""
    return spec.startswith("hf:") and not (Path("hf.py").is_file() or Path("hf/__init__.py").is_file())


def _timm(spec: str) -> Callable[[], nn.Module]:
    timm = _installed("timm", "timm", spec)
    name, *given = spec.removeprefix("timm:").split(",")
    if not timm.is_model(name):  # names such as hf_hub:... would be fetched from the internet
        near = timm.list_models(f"*{name}*")[:6] if name.isidentifier() else []
        raise UsageError(f"--model {spec}: timm has no network {name!r}; {some(near) or 'see timm.list_models()'}")
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier() or key.startswith(("pretrained", "checkpoint")):
            raise UsageError(f"--model {spec}: expected timm:NAME,num_classes=10 and the like, got {text!r}")
        options[key] = _value(value)
    return lambda: timm.create_model(name, pretrained=False, **options)


def _value(text: str) -> Any:
    """A number, a truth value or None; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _hugging_face(spec: str) -> nn.Module:
    """The network that the configuration in a folder describes, with the weights of the folder if there are any."""
    folder = Path(spec.removeprefix("hf:"))
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--model {spec}: no config.json in {folder}. Name a folder that save_pretrained wrote; for a network of the hub, "
            "fetch it first: hf download NAME --local-dir FOLDER"
        )
    transformers = _installed("transformers", "hf", spec)
    _check_no_code(folder / "config.json", transformers, spec)
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    kind = _architecture(transformers, config)
    file = _weights_in(folder)
    if file is None:
        return kind(config)
    tensors = dict(read_weights(file).tensors)
    dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors.values()) else torch.float32
    with _quiet(transformers):
        model, report = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_whole(report, file, kind)
    return model


def _check_no_code(file: Path, transformers: Any, spec: str) -> None:
    """Refuse a folder whose network needs code of its own.

    Raises:
        UsageError: it does, or the configuration cannot be read.
    """
    try:
        described = parse_json(file.read_bytes())
    except ValueError as error:
        raise UsageError(f"--model {spec}: {file} is no plain JSON ({error})") from error
    kind = described.get("model_type") if isinstance(described, dict) else None
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UsageError(
            f"--model {spec}: {file} is for a network of the kind {kind!r}, which this transformers does not have; code in the "
            "folder is not run. Import that code yourself, and name a function that builds the network: --model module:factory"
        )


def _architecture(transformers: Any, config: Any) -> Any:
    """The class that the weights were saved from; the bare network where the configuration does not tell."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    with torch.device("meta"):
        return type(transformers.AutoModel.from_config(config, trust_remote_code=False))


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


def _check_whole(report: dict[str, Any], file: Path, kind: type) -> None:
    """Refuse weights that leave a tensor of the network random, or do not all belong to it.

    Raises:
        CheckpointError: names or shapes differ.
    """
    problems = [
        f"{what.partition('_')[0]} {some(_name(entry) for entry in report[what])}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(what)
    ]
    if problems:
        raise CheckpointError(
            f"{file} does not fit {kind.__name__}: {'; '.join(problems)}. Name the class the weights were saved from in "
            "config.json (architectures), or build the network yourself: --model module:factory"
        )


def _name(entry: Any) -> str:
    return str(entry[0] if isinstance(entry, tuple) else entry)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and reports of the library: what matters in them is said in one line."""
    logging = transformers.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _installed(module: str, extra: str, spec: str) -> Any:
    """A library that isoflat does without.

    Raises:
        UsageError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--model {spec} needs {error.name}, which is not installed: pip install 'isoflat[{extra}]'"
        ) from error
    except Exception as error:
        raise UsageError(f"--model {spec}: importing {module} failed: {reason(error)}") from error
