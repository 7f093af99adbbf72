"""The name of the processor, also where the system does not give one."""

import platform

import pytest
import torch

from runtime import cores


@pytest.mark.parametrize("told, name", [("cpu : 1\nmodel name\t: Fast CPU @ 3 GHz\nmodel name\t: Fast CPU @ 3 GHz\n",
                                         "Fast CPU @ 3 GHz"), ("", "arm"), (OSError(), "arm")])
def test_the_processor_has_a_name_and_its_instructions(monkeypatch, told, name):
    def read_text(_):
        if isinstance(told, OSError):
            raise told
        return told
    monkeypatch.setattr(cores.Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "arm")
    assert cores.processor.__wrapped__() == f"{name} ({torch.backends.cpu.get_cpu_capability()})"
