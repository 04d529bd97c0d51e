"""The race's entrants: real models, other libraries, and whether they do the same arithmetic."""

import json
import os
from functools import partial
from itertools import pairwise

import pytest
import torch

from fusedopt.bench import __main__ as cli
from fusedopt.bench import memory, parity, peers, providers, step, workloads
from fusedopt.bench.results import verdict
from fusedopt.bench.workloads import WORKLOADS

pytest.importorskip("rich", reason="fusedopt.bench needs it")


# ---- workloads ----


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("bert-base", 199, 109_482_240),
        ("vit-l16", 296, 304_326_632),
        ("llama-3-8b", 291, 8_030_261_248),
    ],
)
def test_models_have_the_published_numbers_of_parameters(name, tensors, elements):
    assert len(WORKLOADS[name].shapes) == tensors
    assert WORKLOADS[name].elements == elements


@pytest.mark.parametrize("name", ["gpt2", "bert-base", "llama-3-8b"])
def test_shapes_are_those_of_the_models_own_code(name):
    transformers = pytest.importorskip("transformers")
    llama = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
             "tie_word_embeddings": False}  # fmt: skip
    with torch.device("meta"):
        model = {
            "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config()),
            "bert-base": lambda: transformers.BertModel(transformers.BertConfig()),
            "llama-3-8b": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        }[name]()
    assert WORKLOADS[name].shapes == tuple(tuple(p.shape) for p in model.parameters())


def test_scale_takes_away_blocks_and_changes_the_name():
    whole = WORKLOADS["llama-3-8b"]
    quarter = whole.scaled(0.25)
    assert quarter.name == "llama-3-8b-8-blocks"
    assert len(quarter.shapes) == 3 + 8 * 9
    assert whole.scaled(1.0) is whole
    assert len(whole.scaled(0.001).shapes) == 3 + 9  # one block stays
    assert WORKLOADS["many"].scaled(0.5) is WORKLOADS["many"]


def test_the_sweep_is_geometric_and_asked_for_by_one_name():
    sizes = [WORKLOADS[name].elements for name in workloads.members("sweep")]
    assert (sizes[0], sizes[-1]) == (2**10, 2**30)
    assert {b // a for a, b in pairwise(sizes)} == {4}
    assert "sweep" in workloads.choices()
    assert "sweep-1K" not in workloads.choices()


def test_a_model_of_ones_own_is_a_workload(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(
        "import torch\ndef net():\n    return torch.nn.Linear(30, 7, bias=False)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(WORKLOADS, "model", raising=False)
    result = tmp_path / "result.json"
    arguments = ["--model", "my_net:net", "--optimizers", "SGD", "--providers", "fusedopt,floor"]
    arguments += ["--rounds", "2", "--json", str(result)]
    assert cli.main(["step", *arguments]) == 0
    (row,) = json.loads(result.read_text())["step"]["rows"]
    assert (row["workload"], row["tensors"], row["elements"]) == ("model", 1, 210)
    assert set(row["peak_bytes"]) == {"fusedopt"}  # in a process that has never seen the model
    del WORKLOADS["model"]


def test_a_sweep_goes_as_far_as_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli.machine, "available_memory", lambda device: 500_000)
    result = tmp_path / "result.json"
    arguments = ["--workloads", "sweep", "--optimizers", "SGD", "--providers", "fusedopt,floor"]
    arguments += ["--rounds", "1", "--memory", "none", "--json", str(result)]
    assert cli.main(["step", *arguments]) == 0
    rows = json.loads(result.read_text())["step"]["rows"]
    assert [row["workload"] for row in rows] == ["sweep-1K", "sweep-4K"]
    said = capsys.readouterr().out
    assert "Left out: workload sweep-16K needs" in said
    assert "sweep: one tensor of so many elements" in said


# ---- arithmetic ----


class Wrong(torch.optim.Adam):
    """Adam with one thing wrong, chosen by the class attribute."""

    wrong = ""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state, grad = self.state[p], p.grad
                m = state.setdefault("m", torch.zeros_like(p))
                v = state.setdefault("v", torch.zeros_like(p))
                t = state["t"] = state.get("t", 0) + 1
                lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
                b1, b2 = group["betas"]
                if self.wrong == "decoupled":
                    p.mul_(1 - lr * decay)
                else:
                    grad = grad + decay * p
                m.mul_(b1).add_(grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
                c1, c2 = 1 - b1**t, 1 - b2**t
                if self.wrong == "uncorrected":
                    c2 = 1.0
                root = (v / c2).sqrt() + eps
                if self.wrong == "eps":
                    root = (v / c2 + eps**2).sqrt()
                p.sub_(lr / c1 * m / root)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [("", "same"), ("decoupled", "decay differs"), ("uncorrected", "differs"), ("eps", "differs")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_arithmetic_shows(wrong, found, dtype):
    cls = type("Mutant", (Wrong,), {"wrong": wrong})
    told = parity.check(cls, "Adam", dtype)
    assert verdict(told.to_json()) == found, told


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW"])
@pytest.mark.parametrize("name", ["torch-default", "fusedopt", "fusedopt-generic"])
def test_torch_and_fusedopt_do_the_same_arithmetic(name, optimizer):
    provider = providers.PROVIDERS[name]
    for dtype in (torch.float32, torch.float64):
        told = parity.check(partial(provider.optimizer, optimizer), optimizer, dtype)
        assert told.same
        assert set(told.ulps) == {"from zeros", "with decay"}
        assert told.worst < 8


def test_a_nan_is_never_the_same():
    found = torch.tensor([1.0, float("nan")])
    assert parity.ulps_of_update(torch.zeros(2), found, torch.ones(2)) == float("inf")


def test_parity_compares_classes_by_import_path(tmp_path, capsys):
    result = tmp_path / "rows.json"
    arguments = ["torch.optim:AdamW", "fusedopt.Adam", "--json", str(result)]
    assert cli.main(["parity", *arguments]) == 0
    rows = json.loads(result.read_text())["parity"]["rows"]
    assert [(row["who"], row["optimizer"]) for row in rows] == [
        ("torch default", "AdamW"), ("torch.optim:AdamW", "AdamW"), ("fusedopt.Adam", "Adam"),
    ]  # fmt: skip
    assert cli.main(["parity", "torch.optim:AdamW", "--as", "Adam"]) == 1
    assert "decay differs" in capsys.readouterr().out


# ---- other libraries ----


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_an_installed_peer_does_its_share_or_says_why(peer):
    if not peer.installed():
        pytest.skip(f"{peer.library} is not installed: make bench-peers")
    if "cpu" not in peer.devices:
        pytest.skip(f"{peer.title} runs on a GPU")
    if peer.library in ("deepspeed", "torchao"):
        pytest.skip("it compiles for minutes; `fusedopt.bench list` tries it")
    for optimizer in peer.classes:
        assert peer.unavailable(optimizer) == ""
        told = parity.check(partial(peer.optimizer, optimizer), optimizer)
        assert told.ulps["from zeros"] < parity.SAME[torch.float32]


def test_an_absent_or_broken_library_is_a_reason_and_no_error(tmp_path, monkeypatch):
    broken = {"AdamW": ("broken_library.AdamW", {})}
    absent = peers.Peer("absent", "Absent", "no_such_library", broken)
    assert absent.unavailable("AdamW").startswith("no_such_library is not installed; make bench")
    (tmp_path / "broken_library.py").write_text("raise OSError('libcuda.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    peer = peers.Peer("broken", "Broken", "broken_library", broken)
    monkeypatch.setattr(peers, "PEERS", (peer,))
    assert peer.unavailable("AdamW") == "libcuda.so is missing"
    assert peer.unavailable("SGD") == "Broken has no SGD"
    assert peer.unavailable("AdamW", device="cuda") != ""
    assert not peer.offers("SGD", "cpu")


def test_a_peer_is_told_torchs_defaults(tmp_path, monkeypatch):
    (tmp_path / "eager_library.py").write_text(
        "class Adam:\n    def __init__(self, params, lr, eps=1, betas=2, flag=True):\n"
        "        self.told = (lr, eps, betas, flag)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    peer = peers.Peer("eager", "Eager", "eager_library", {"Adam": ("eager_library.Adam", {})})
    assert peer.optimizer("Adam", [], lr=0.1).told == (0.1, 1e-8, (0.9, 0.999), True)


def test_quiet_silences_file_descriptors_and_gives_them_back(capfd):
    with peers.quiet():
        os.system("echo chatter of a child; echo chatter >&2")
    os.system("echo after")
    assert tuple(capfd.readouterr()) == ("after\n", "")


def test_every_tier_is_a_provider_and_leaves_the_one_in_use_alone():
    import fusedopt

    before = fusedopt.cpu_tier()
    for tier in fusedopt.cpu_tiers():
        contestant = providers.PROVIDERS[f"fusedopt-{tier}"].build("SGD", [torch.ones(100)])
        contestant.step()
    assert fusedopt.cpu_tier() == before


def test_list_names_everybody(capsys, monkeypatch):
    monkeypatch.setattr(peers, "_trial", lambda *_: "not tried")  # some compile for minutes
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    for name in (*providers.PROVIDERS, *WORKLOADS):
        assert name in said


# ---- memory ----


def test_memory_is_what_the_states_take(monkeypatch):
    small = workloads.Workload("small", "", ((2**22,),) * 4, standard=False)
    monkeypatch.setitem(WORKLOADS, "small", small)
    tasks = [step.Task("small", "AdamW"), step.Task("small", "SGD")]
    ours, sgd = memory.in_fresh_process("fusedopt", tasks)
    states = small.elements * 4
    assert 2 * states <= ours < 2.2 * states
    assert states <= sgd < 1.2 * states
