"""The file that ``model.weights`` may name; what is wrong with it is told without PyTorch, before anything starts."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from svip.config import ConfigError

NO_FILE = ("timm", "none")


def stored_names(weights: str) -> set[str]:
    """The tensors that the file holds, of which only the header is read: none without a file. ConfigError names it."""
    if weights in NO_FILE:
        return set()
    if not Path(weights).is_file():
        raise ConfigError(f"model.weights: no file {weights}; expected 'timm', 'none' or a .safetensors file")
    if not weights.endswith(".safetensors"):
        raise ConfigError(f"model.weights: {weights} is not a .safetensors file; convert it (pickles are not read)")
    try:
        with safe_open(weights, "np") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ConfigError(f"model.weights: {weights} cannot be read as safetensors: {error}") from error
