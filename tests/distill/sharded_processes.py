"""`accelerate launch ... -m tests.distill.sharded_processes FOLDER`: sharded runs, and what each of two processes finds.

Writes FOLDER/two (straight runs), FOLDER/there (one process's runs, continued), FOLDER/job (the run of FOLDER/job.yaml,
by the command) and FOLDER-RANK.json.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.distill import alarm, sharding
from fewstep.distill.__main__ import main as command
from fewstep.distill.batches import Batches
from fewstep.distill.distiller import Role
from fewstep.distill.record import Record
from fewstep.distill.run import train
from fewstep.samplers.adapters import bare
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.load import denoiser_of
from tests.distill.runs import config
from tests.distill.two_processes import SAME, outcome
from tests.pipelines import tiny_stable_diffusion, tiny_wan

RUNS: dict[str, dict[str, Any]] = {
    # student and fake score on one base, and a discriminator on features
    "dmd2-lora": {
        **{"steps": [1, 2], "fake_score_updates": 2, "gan_weight": 0.1, "discriminator_weight": 1.0},
        # parts have a rule for every operation on every shape, which torch finds anew in each process
        **{"gradient_accumulation_steps": 1, "target_modules": ["to_q", "to_v"]},
    },
    # student, its moving average as target, teacher; two micro-batches an iteration
    "lcm-full": {"steps": [1, 2]},
}


def settings(folder: Path, where: str, name: str, world: int, **changes: Any) -> Any:
    """Four rows a micro-batch, over all processes."""
    method, kind = name.split("-")
    own = {
        **{"method": method, "name": name, "student": kind, "train_data": str(folder / "images")},
        **{"train_batch_size": 4 // world, "cache_dir": str(folder / f"cache-{world}")},
        **{"sharding_strategy": "no_shard" if world == 1 else "full_shard"},
        **{"validation_prompts": ["thing 1", "thing 2"], "validation_steps": 2, "preflight": False},
    }
    return config(folder / where, **(own | SAME | RUNS[name] | changes))


def looked_at(patch: pytest.MonkeyPatch) -> None:
    """Samples of the student are looked at before each iteration, and nothing is made of it."""
    for name, value in (("BUDGET", 1e3), ("SHARE", 1e-6), ("TIMES", 1e6)):
        patch.setattr(alarm, name, value)


def held(roles: dict[str, Role], base: Denoiser) -> dict[str, Any]:
    """Kinds of the parameters of roles, of their networks and modules; share of the elements that this process holds."""
    modules = [bare(n) for d in (base, *(r.denoiser for r in roles.values())) for n in d.networks.values()]
    modules += [m for role in roles.values() for m in role.modules.values()]
    parameters = [p for m in modules for p in m.parameters()]
    parameters += [p for role in roles.values() for p in role.parameters.values()]
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return {
        "kinds": sorted({type(p).__name__ for p in parameters}),
        "share": local / sum(p.numel() for p in parameters),
        "trained": sum(len(role.parameters) for role in roles.values()),
        "modules": sorted(m for role in roles.values() for m in role.modules),
    }


def derivative(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """A prediction and its derivative along a direction, from fixed inputs."""
    x, dx = torch.randn(2, 2, *denoiser.latent_shape(), generator=torch.Generator().manual_seed(1))
    condition = denoiser.encode(["a cat", "a dog"])
    with torch.no_grad():
        return denoiser.jvp(x, torch.tensor([0.7, 0.3]), condition, dx, torch.ones(()))


def sides(accelerator: Accelerator) -> float:
    """Wan 2.2, whose rows are one network's on one process and the other's on the other: distance from one process's.

    Of predictions, features, and gradients of their squares, means over all rows; where nobody needs a network, it has none.
    """
    rank, device = accelerator.process_index, accelerator.device
    whole, split = (denoiser_of(tiny_wan(two_transformers=True)) for _ in range(2))
    x = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    condition = whole.encode(["a cat", "a dog"])
    sharding.together(split, device)
    sharding.shard([], split, device)
    worst = 0.0
    for levels, called in (([0.98, 0.2], [True, True]), ([0.98, 0.95], [True, False]), ([0.1, 0.2], [False, True])):
        t = torch.tensor(levels)
        grads: list[dict[str, Tensor | None]] = []
        outputs: list[Tensor] = []
        for denoiser, rows in ((whole, slice(0, 2)), (split, slice(rank, rank + 1))):
            parameters = {f"{n}.{k}": p for n, m in denoiser.networks.items() for k, p in m.named_parameters()}
            for p in parameters.values():
                p.requires_grad_(True).grad = None
            output, features = denoiser.predict_with_features(x[rows], t[rows], condition[rows])
            (output.square().mean() + features[0].square().mean()).backward()
            outputs.append(output.detach())
            grads.append({k: None if p.grad is None else sharding.whole(p.grad) for k, p in parameters.items()})
        worst = max(worst, (outputs[1] - outputs[0][rank]).abs().max().item())
        for key, a in grads[0].items():
            b = grads[1][key]
            assert (a is not None) == (b is not None) == called[key.startswith("transformer_2.")], key
            if a is not None and b is not None:
                worst = max(worst, (a - b).norm().item() / (a.norm().item() + 1e-6))
    return worst


def main(folder: Path) -> None:
    """Everything, in one program: starting one is slow."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    found: dict[str, Any] = {"world": accelerator.num_processes, "held": []}
    shard = sharding.shard

    def sharded(roles: Any, base: Denoiser, device: torch.device) -> None:
        before = [weakref.ref(p) for role in roles for p in role.parameters.values()]
        whole: list[int] = []
        real = sharding._shard

        def noting(module: Any, mesh: Any) -> None:
            real(module, mesh)
            whole.append(sum(p() is not None for p in before))

        sharding._shard = noting
        shard(roles, base, device)
        sharding._shard = real
        found["held"].append(held(dict(enumerate(roles)), base) | {"whole": [len(before), *whole]})

    sharding.shard = sharded
    looked_at(pytest.MonkeyPatch())
    for name in RUNS:
        train(settings(folder, "two", name, 2), teacher=denoiser_of(tiny_stable_diffusion()))
    Record.preview = lambda *_: None  # type: ignore[method-assign]  # twenty guided steps of the teacher, each time
    for name in RUNS:
        train(settings(folder, "there", name, 2), resume=True, teacher=denoiser_of(tiny_stable_diffusion()))
    sharding.shard = shard
    sys.argv[1:] = [str(folder / "job.yaml")]
    with pytest.raises(SystemExit) as end:
        command()
    found["job"] = end.value.code

    teacher = denoiser_of(tiny_stable_diffusion())
    plain = derivative(teacher)
    shard([], teacher, accelerator.device)
    found["derivative"] = [
        (a - b).norm().item() / b.norm().item() for a, b in zip(derivative(teacher), plain, strict=True)
    ]

    found["sides"] = sides(accelerator)

    real = Batches.__call__

    def spoilt(self: Batches, iteration: int, micro: int) -> Any:
        batch, rng = real(self, iteration, micro)
        if (rank, iteration) == (1, 2):
            batch.x0 = batch.x0 * torch.nan
        return batch, rng

    Batches.__call__ = spoilt  # type: ignore[method-assign]
    bad = settings(folder, "bad", "lcm-full", 2, gradient_accumulation_steps=1)
    found["non-finite"] = outcome(lambda: train(bad, teacher=denoiser_of(tiny_stable_diffusion())))
    Path(f"{folder}-{rank}.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
