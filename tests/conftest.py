"""One thread per test process: the models are tiny, and the processes share the cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield
