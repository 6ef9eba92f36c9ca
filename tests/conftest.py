"""What every test shares: no network, one thread, and one small trained model."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # before any import of them

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side; a second thread for each would only wait for the first


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
