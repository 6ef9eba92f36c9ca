"""What every test shares: one thread, one seed, and no network."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before any import of them

import socket

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side; a second thread for each would only wait for the first


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """A test that reaches for another machine fails, even where there is a network."""
    connect = socket.socket.connect

    def only_here(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reaches for the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
