import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors here are tiny: on cores shared with other work, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
