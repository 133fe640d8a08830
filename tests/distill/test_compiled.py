"""Compiled networks: each adapter has its own form, and training gives the same bits, with checkpointing too."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.distill import efficiency
from fewstep.distill.run import train
from fewstep.samplers.adapters import Adapted, adapters_added
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config, metrics
from tests.pipelines import tiny_dit


def adapted() -> torch.nn.Module:
    """A tiny network with the adapters of two roles, which alone are trained; no weight is zero."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))
    for name in ("student", "fake_score"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), network, adapter_name=name)
    adapters_added(network)
    for key, p in network.named_parameters():
        torch.nn.init.normal_(p)
        p.requires_grad_(".lora_" in key)
    return network


def answers(network: torch.nn.Module, *forms: tuple[str | None, bool]) -> list[Tensor]:
    """Of each form, an adapter or none, with or without gradients; twice in turn, then the gradients of the first with."""
    x = torch.linspace(-1, 2, 12).reshape(3, 4)
    found = []
    for name, grad in forms * 2:
        with torch.set_grad_enabled(grad):
            found.append(Adapted(network, name)(x))
    next(y for y in found if y.requires_grad).square().sum().backward()
    return [y.detach() for y in found] + [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_compiled_networks_follow_their_adapter():
    """One compiled network with two adapters and none: in turn, twice, with and without gradients, three answers."""
    network, frames = adapted(), []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    forms = [(name, grad) for name in ("student", None, "fake_score") for grad in (False, True)]
    expected = answers(network, *forms)
    network.zero_grad()
    efficiency.compiled(network, backend)  # type: ignore[arg-type]
    got = answers(network, *forms)
    assert len(got) == len(expected) == 12 + 4
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))
    assert not expected[0].equal(expected[2])
    assert len(frames) >= 3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_inductor_gives_what_the_network_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As `compile: true` has it, with a C++ compiler: values and gradients of two adapters, to a rounding of float32."""
    from torch._inductor import config as inductor
    from torch._inductor.utils import fresh_cache

    # one by one and in this process: a pool of compilers costs more than two small files
    monkeypatch.setattr(inductor, "compile_threads", 1)
    network, forms = adapted(), (("student", True), ("fake_score", True))
    expected = answers(network, *forms)
    network.zero_grad()
    torch._dynamo.reset()
    with fresh_cache(dir=str(tmp_path)):  # or the files of an earlier run would do
        efficiency.compiled(network)
        got = answers(network, *forms)
        assert list(tmp_path.rglob("*.so"))
    assert len(got) == len(expected) == 4 + 4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not expected[0].allclose(expected[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_networks_train_the_same_bits(
    tmp_path: Path, kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two iterations of student, fake score and teacher by `train`; what dynamo captures is run as it is, uncompiled."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = efficiency.compiled
    monkeypatch.setattr(efficiency, "compiled", lambda network: compiled(network, backend))  # type: ignore[arg-type]
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what `refuse` tries
    torch._dynamo.reset()
    (tmp_path / "prompts.txt").write_text("golden retriever\n7\n")
    changes = {"student": kind, "rank": 2, "train_data": None, "prompts": str(tmp_path / "prompts.txt"), "steps": [1]}
    changes |= {"fake_score_updates": 1, "max_train_steps": 2, "train_batch_size": 2, "guidance_scale": 2.0}
    changes |= {"method": "dmd2", "preflight": False, "gradient_checkpointing": checkpointing}
    runs = []
    for on in (False, True):
        folder = train(config(tmp_path, **changes, compile=on, name=str(on)), teacher=denoiser_of(tiny_dit()))
        runs.append((metrics(folder), (folder / "checkpoints/step-000002/manifest.json").read_text()))
        assert bool(graphs) == on
    assert runs[0] == runs[1]
