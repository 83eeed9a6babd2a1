"""What ``python -m deepinv_flows`` prints."""

import subprocess
import sys

import torch

import deepinv_flows


def test_a_bug_report_has_versions_devices_and_weights():
    command = [sys.executable, "-W", "ignore", "-m", "deepinv_flows"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["deepinv_flows"] == deepinv_flows.__version__ and torch.__version__.startswith(facts["torch"])
    assert "gravel, lfw, natural, natural15-50, natural25" in printed and "CUDA" in facts and int(facts["threads"]) >= 1
