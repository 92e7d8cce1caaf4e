"""Pipelines: chains of components, and how to compile and run them."""
