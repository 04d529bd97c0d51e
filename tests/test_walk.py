"""The threads that help a plan on a device walk over its rows: never in the way, never needed."""

import os
import threading

import pytest
import torch
from devices import Rehearsed
from harness import make_params, set_grads, states_of

import fusedopt
from fusedopt import backends

ROWS = 700  # 44 blocks: far beyond what is walked serially


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, Rehearsed.backend, Rehearsed.row)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def made(backend="rehearsal"):
    params = make_params([(3,)] * ROWS)
    return params, fusedopt.AdamW(params, lr=0.1, backend=backend)


def take(params, optimizer, steps):
    for step in range(steps):
        set_grads(params, step % 3)
        optimizer.step()


def assert_like_the_cpus(params, optimizer, steps):
    others, other = made("cpu")
    take(others, other, steps)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert all(
            torch.equal(x, states_of(other, b)[k]) for k, x in states_of(optimizer, a).items()
        )


@pytest.mark.parametrize("threads", [1, 2, 8, 20])
def test_the_steps_are_the_same_with_any_number_of_threads(threads):
    torch.set_num_threads(threads)
    params, optimizer = made()
    take(params, optimizer, 40)
    assert_like_the_cpus(params, optimizer, 40)


def test_the_number_of_threads_may_change_between_steps():
    params, optimizer = made()
    for step in range(60):
        torch.set_num_threads(1 + step % 9)
        set_grads(params, step % 3)
        optimizer.step()
    assert_like_the_cpus(params, optimizer, 60)


def test_several_threads_may_step_at_once():
    """One has the helpers, the others walk alone."""
    torch.set_num_threads(4)
    runs = [made() for _ in range(3)]
    threads = [threading.Thread(target=take, args=(*run, 30)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        assert_like_the_cpus(*run, 30)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of 3.12: there are threads
def test_a_forked_process_walks_alone():
    torch.set_num_threads(4)
    params, optimizer = made()
    take(params, optimizer, 3)
    child = os.fork()
    if child == 0:
        same = False
        try:
            take(params, optimizer, 3)
            same = all(float(optimizer.state[param]["step"]) == 6 for param in params)
        finally:
            os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    take(params, optimizer, 3)
