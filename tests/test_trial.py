"""What decides whether own Triton kernels are used; the card itself is a GPU test's matter."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

from higgs_lab.trial import kernels_agree

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
ONES = torch.ones(3)


def fails():
    raise RuntimeError("no compiler")


def full():
    raise torch.OutOfMemoryError("full")


def agree(results, fits=lambda: True, dtype=BF16) -> bool:
    return kernels_agree(CUDA, dtype, fits, results, "speaking is slower")


@pytest.fixture
def hopper(monkeypatch):
    """As if a card were there; results of the tests lie on the CPU."""
    monkeypatch.setattr("higgs_lab.trial.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")


def test_what_is_equal_is_used(hopper):
    assert agree(lambda: [(ONES, 1.01 * ONES)])


@pytest.mark.parametrize("found", [1.1 * ONES, float("nan") * ONES])
def test_what_differs_is_not_and_a_warning_says_so(hopper, found):
    with pytest.warns(UserWarning, match="wrong here, speaking is slower"):
        assert not agree(lambda: [(ONES, ONES), (found, ONES)])


def test_what_does_not_run_is_not(hopper):
    with pytest.warns(UserWarning, match="does not run here, speaking is slower: no compiler"):
        assert not agree(fails)
    with pytest.warns(UserWarning, match="no compiler"):
        assert not agree(lambda: [(ONES, ONES)], fits=fails)  # a Triton that cannot be imported


def test_what_was_never_made_for_it_is_not_tried(hopper):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not agree(fails, fits=lambda: False)
        assert not agree(fails, dtype=torch.float32)
        assert not kernels_agree(torch.device("cpu"), BF16, fails, fails, "")


def test_a_full_card_is_no_verdict(hopper):
    with pytest.raises(torch.OutOfMemoryError):
        agree(full)


def test_gradients_are_there_whatever_mode_the_caller_is_in(hopper):
    def results():
        x = torch.ones(3).requires_grad_()
        (grad,) = torch.autograd.grad((x * x).sum(), x)
        return [(grad, 2 * ONES.clone())]

    with torch.inference_mode():
        assert agree(results)
    with torch.no_grad():
        assert agree(results)
