"""SVIP: Semantically Contextualized Visual Patches for zero-shot learning."""

__version__ = "0.1.0"
