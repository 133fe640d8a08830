"""Images of a row, drawn and kept on disk: what is there already is not drawn again, and each process draws its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from fewstep.app.cost import at_batch_sizes, measured
from fewstep.app.processes import Processes
from fewstep.app.rows import Row
from fewstep.app.store import Store, plain, summary
from fewstep.distill.cache import digest_of
from fewstep.distill.evaluation import Sampler
from fewstep.distill.prompt_sets import PromptSet
from fewstep.metrics.networks import fingerprint


def draw(
    sampler: Sampler,
    plan: str,
    prompts: PromptSet,
    root: Path,
    batch_size: int,
    cost_batches: Sequence[int],
    processes: Processes,
    accept: Callable[[Tensor], None],
) -> Row:
    """A row of one image for each prompt.

    Args:
        sampler: who draws.
        plan: of a student, as text: with another one it draws other images.
        prompts: and seeds.
        root: folder of the images of all rows.
        batch_size: images at once.
        cost_batches: other batch sizes whose cost is measured.
        processes: that share the work.
        accept: told the first image (1, ...) uint8, and may refuse it before the others are drawn.
    """
    first, alone = measured(sampler, prompts.prompts[:1], prompts.seeds[:1])  # and the first call of a process is slow
    accept(first)
    about = {
        **{"source": sampler.source, "role": sampler.role, "steps": sampler.steps, "guidance": sampler.guidance},
        **{"scheduler": sampler.scheduler, "plan": plan, "shape": list(first.shape[1:])},
        "weights": [fingerprint(network, "") for network in sampler.networks],
        "pipeline": digest_of(sampler.pipeline, _others(sampler), type(sampler.pipeline).__name__),
        "solver": {k: str(v) for k, v in sorted(sampler.solver.config.items()) if not k.startswith("_")},
        **{"seed": prompts.seeds[0], "prompts": prompts.prompts},
    }
    name = Path(plain(Path(sampler.source).name)) / f"{sampler.steps}-step{'s' if sampler.steps > 1 else ''}"
    store = Store(root, name, about, len(prompts), first.ndim == 5)
    processes.wait()
    left = store.missing(batch_size)
    processes.wait()  # nobody draws before all have looked
    mine = processes.share(left)
    if left and (there := sum(file.exists() for file in store.files)):
        processes.say(f"{store.folder}: {there} of {len(prompts)} images are there; going on")
    with processes.bar(sum(map(len, mine)), f"{sampler.role}, steps {sampler.steps}") as progress:
        for numbers in mine:
            images, cost = measured(sampler, [prompts.prompts[i] for i in numbers], [prompts.seeds[i] for i in numbers])
            store.add(numbers, images, cost, processes.rank)
            if progress is not None:
                progress(len(numbers))
    processes.wait()
    costs = store.costs() or [alone]
    if processes.first:
        costs += at_batch_sizes(sampler, prompts.prompts, prompts.seeds, cost_batches)
    nfe, table = summary(costs, [batch_size, *cost_batches])
    usual = next((line for line in table if line["batch_size"] == batch_size), table[-1])
    row = {
        **{"source": sampler.source, "role": sampler.role, "steps": sampler.steps, "nfe": nfe},
        **{"guidance": sampler.guidance, "scheduler": sampler.scheduler},
        **{"seconds_per_image": usual["seconds_per_image"], "n": len(prompts), "cost": table},
    }
    found = Row(row, store.files, prompts.prompts, prompts.groups, same_noise=True, clips=first.ndim == 5)
    if found.clips:
        found.frames_per_second = sampler.frames_per_second
    return found


def _others(sampler: Sampler) -> list[str]:
    """Components of its pipeline that are none of its networks."""
    return [k for k, v in sampler.pipeline.components.items() if not any(v is network for network in sampler.networks)]
