"""Figures of the student while it trains, on fixed prompts and noise: pure functions of its weights, so a resumed run
logs what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.distill import cache, report
from fewstep.distill.config import ConfigError, TrainConfig
from fewstep.distill.efficiency import autocast
from fewstep.distill.eval_config import PREFIX
from fewstep.distill.evaluation import device, reference_pictures, same_size
from fewstep.distill.evaluation import figures as of_pictures
from fewstep.distill.judges import Judges
from fewstep.distill.metric_names import DRAWINGS, check, fewest
from fewstep.distill.prompt_sets import PromptSet, prompt_set
from fewstep.distill.references import CACHE, read_reference
from fewstep.distill.seen import Seen, figures, see, see_prompt
from fewstep.samplers.condition import Condition
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.plan import SamplingPlan, sample


class InTraining:
    """Figures of whatever student it is called with.

    Args:
        config: says which figures, of how many images, against what.
        prompts: whose images are judged.
        condition: one row for each of them, on the CPU.
        plan: that the student is sampled by.
        shape: of its latents.

    Raises:
        ConfigError, UserError: figures that cannot be had here, missing weights; before anything is trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: PromptSet,
        condition: Condition,
        plan: SamplingPlan,
        shape: tuple[int, ...],
    ):
        self.names, self.prompts, self.condition = config.eval_metrics, prompts, condition
        self.plan, self.shape = plan, shape
        given = {"prompts", "clips" if len(shape) == 4 else "images"} | ({"embedded"} if prompts.embedded else set())
        given |= {"variants"} if len(set(prompts.groups)) < len(prompts) else set()
        check(self.names, given | {"reference"}, prompts.name)
        self.batch, self.precision = config.train_batch_size, config.mixed_precision
        self.judges = Judges(config.eval_weights, device(), "eval_weights: {}".format)
        self.judges.load(self.names)
        self.real = reference_pictures(prompts, self.names)
        self.reference: Seen | None = None
        if config.eval_reference is not None:
            self.reference = read_reference(config.eval_reference, self.names, self.judges, CACHE.expanduser())

    def images(self, student: Denoiser) -> Tensor:
        """All images, uint8, on the CPU."""
        parts = []
        for i in range(0, len(self.prompts), self.batch):
            rows = range(i, min(i + self.batch, len(self.prompts)))
            condition = self.condition[rows].to(student.device)
            with autocast(self.precision, student.device):
                latents = sample(student, condition, self.plan, [self.prompts.seeds[r] for r in rows], self.shape)
            parts.append((student.decode(latents).cpu() * 255).round().to(torch.uint8))
        return torch.cat(parts)

    @torch.no_grad()
    def __call__(self, student: Denoiser) -> dict[str, float]:
        """Values by `eval/NAME`."""
        images, seen = self.images(student), Seen()
        same_size(images, self.prompts, self.real)
        drawings = [n for n in self.names if n in DRAWINGS]
        others = [n for n in self.names if n not in DRAWINGS]
        for i in range(0, len(images), self.batch):
            part = images[i : i + self.batch]
            keys = range(i, i + len(part))
            see(seen, part, keys, others, self.judges, [self.prompts.prompts[k] for k in keys])
        groups = torch.tensor(self.prompts.groups)
        for group in dict.fromkeys(self.prompts.groups):
            see_prompt(seen, images[groups == group], group, others, self.judges)
        found, _ = figures(others, seen, self.judges, self.prompts.groups, self.reference)
        if drawings:
            found |= of_pictures(images, self.prompts, drawings, self.real)
        return {PREFIX + name: found[name][0] for name in self.names if name in found}


def prompts_of(config: TrainConfig, teacher: Denoiser, captions: Sequence[str]) -> tuple[PromptSet, Condition]:
    """What is judged, and a condition for each image, on the CPU, encoded by the teacher's encoders.

    `captions` are the data set's, which may be what is judged.
    """
    if getattr(config, "train_text_encoder", False):
        raise ConfigError("config: eval_steps: conditions are encoded once, and train_text_encoder changes them")
    source = config.eval_prompts or report.prompt_sources(config, captions)[0]
    prompts = prompt_set(source, config.eval_num, config.seed)
    for name in config.eval_metrics or ():
        if len(prompts) < (least := fewest(name)):
            raise ConfigError(f"config: eval_num: {name} needs {least} images or more")
    different = list(dict.fromkeys(prompts.prompts))
    place = {prompt: i for i, prompt in enumerate(different)}
    return prompts, cache.conditions(config, teacher, different)[[place[p] for p in prompts.prompts]]


def steps_of(config: TrainConfig, counts: Sequence[int]) -> int:
    """Step count that the student is judged at; ConfigError for one that it has not."""
    steps = config.eval_sampling_steps or min(counts)
    if steps not in counts:
        raise ConfigError(f"config: eval_sampling_steps: {steps} is not a step count of this student; it has {counts}")
    return steps
