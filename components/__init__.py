"""Kubeflow components: one folder a step of ``svip.steps``, and nothing in it but the call."""

import os

IMAGE = os.environ.get("SVIP_IMAGE", "svip:latest")
"""The prebuilt image that all components run in (built from infra/docker); nothing is installed at run time."""
