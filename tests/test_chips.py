"""Peak rates are those of the devices that are there."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from llm_jax.chips import PEAK_FLOPS, measured_matmul_flops, peak_flops


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_the_peak_of_an_accelerator_is_that_of_all_its_devices(kind: str, flops: float, monkeypatch: Any):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 4)
    assert peak_flops() == 4 * flops


def test_an_unknown_accelerator_has_no_peak(monkeypatch: Any):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind="TPU v99")])
    assert peak_flops() is None


def test_a_longer_name_is_looked_up_before_its_beginning():
    kinds = list(PEAK_FLOPS)
    assert [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :] if b.startswith(a)] == []


def test_a_cpu_is_measured():
    assert peak_flops() == measured_matmul_flops() > 1e8
