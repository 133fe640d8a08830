"""The distribution matching family: DMD2, SiD, SIM, SwiftBrush, TDM and what lies between them; papers in `presets.py`.

The student makes a sample from its own rollout, clean or at a lower level. Noised to a random level, two denoisers look
at it: the teacher and a fake score that is trained online on the student's samples. A divergence between the two says
where the sample should move. A method is a preset of parts: divergence and weight, policy, guidance of each score, a GAN
or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fewstep.distill.distiller import Batch, Distiller, Losses, Role
from fewstep.distill.family_config import DistributionMatchingConfig, Explicit, Noisy
from fewstep.distill.networks import Networks
from fewstep.distill.objectives import adversarial, cost, implicit, phases, policy, regression
from fewstep.distill.objectives.divergence import huber, reverse_kl, sid, sim, spread, surrogate, weighted
from fewstep.distill.objectives.f_divergence import FEW, H, density_ratio, uni_instruct, weights
from fewstep.distill.objectives.fake_score import reweighted, subinterval_error, x0_hat_error
from fewstep.distill.objectives.levels import ends, even_levels, first_level, start_scale
from fewstep.distill.objectives.policy import Draws, Point, backward_simulation, compared, drawn_step, noised_data
from fewstep.distill.random import Rngs
from fewstep.samplers.condition import Condition, concatenate, dropped
from fewstep.samplers.errors import UserError
from fewstep.samplers.noise import expand
from fewstep.samplers.plan import SamplingPlan, plan_of_levels


class DistributionMatching(Distiller):
    """Student: surrogate of the divergence's direction; fake score: denoising of the student's samples."""

    needs = frozenset({"prompts"})

    @classmethod
    def needs_of(cls, config: DistributionMatchingConfig) -> frozenset[str]:
        images = config.discriminates or config.policy == "noised_data"
        pairs = config.regression_weight > 0
        return cls.needs | {name for name, needed in (("images", images), ("pairs", pairs)) if needed}

    def __init__(self, config: DistributionMatchingConfig, networks: Networks):
        self.config = config
        self.teacher = networks.teacher()
        self.noise = self.teacher.denoiser.noise
        self.target = self.teacher.denoiser  # what the student is held to
        # where the scale is an input of the networks, the student is told the teacher's, and so is its fake score
        self.guidance = config.guidance_scale if self.teacher.denoiser.takes_guidance else None
        if self.guidance is not None and config.guidance_scale_max is not None:
            raise UserError(
                "guidance_scale_max: this teacher is told its scale, as the student is: one, guidance_scale"
            )
        at_level = config.start == "level"
        self.top, self.ends = first_level(config, self.noise), ends(config, self.noise)
        t = self.noise.shift(torch.tensor(self.top, dtype=torch.float64))
        self.scale = float(self.noise.sigma(t)) if at_level else start_scale(self.noise)
        if config.start_gap and self.scale != 1:
            raise UserError(f"start_gap: a start from noise of scale {self.scale:.4g} has one level; set start_gap: 0")
        self.phase_ends = phases.phase_ends(networks.base, config, self.top)
        self.phases = phases.shares(config.steps[0], self.phase_ends)
        # of one network a LoRA takes over where a phase ends, of several the next of them
        self.taken_over = self.phase_ends if len(networks.base.networks) == 1 else ()
        self.student = networks.trained("student", phase_ends=self.taken_over)
        if config.step_conditioned:
            self.fake_score = networks.numbered("fake_score")
        else:
            self.fake_score = networks.trained("fake_score", phase_ends=self.taken_over)
        self.discriminator: adversarial.Discriminator | None = None
        if config.discriminates:
            shape = networks.base.latent_shape(config.height, config.width, config.num_frames)
            blocks, of_teacher = config.feature_blocks or (), config.discriminator_features == "teacher"
            read = self.teacher.denoiser if of_teacher else None
            self.discriminator = adversarial.discriminator(
                self.fake_score, config.discriminator, blocks, config.seed, shape, read
            )

    def roles(self) -> dict[str, Role]:
        return {"teacher": self.teacher, "student": self.student, "fake_score": self.fake_score}

    def on_pairs(self, iteration: int) -> bool:
        """Whether the student learns from pairs alone; the fake score begins after it, when there are samples to know."""
        return iteration < self.config.regression_warmup_steps

    def updates(self, iteration: int) -> list[str]:
        if self.on_pairs(iteration):
            return ["student"]
        iteration -= self.config.regression_warmup_steps
        _, since = phases.phase_of(iteration, len(self.phases), self.config)
        if since >= 0 and since % self.config.fake_score_updates == 0:
            return ["student", "fake_score"]
        return ["fake_score"]

    def draw(self, batch: Batch, rng: Rngs, iteration: int, roles: list[str]) -> Draws:
        assert batch.condition is not None
        c, condition = self.config, batch.condition
        if self.on_pairs(iteration):
            return self.pairs_alone(batch, rng)
        if c.prompt_dropout:
            condition = dropped(condition, rng.uniform("dropout") >= c.prompt_dropout)
        if c.policy in Noisy:
            told, plan = condition.with_guidance(self.guidance), self.plan(policy.drawn_count(c.steps, rng))
            if c.policy == "trajectory":
                draws = policy.trajectory_draws(c, self.student.denoiser, told, plan, rng, batch.shape, roles)
                if batch.pairs is not None and "student" in roles:
                    draws.paired = policy.paired_step(batch.pairs, plan, self.ends, rng, self.noise)
            else:
                number, _ = phases.phase_of(iteration, len(self.phases), c)
                draws = phases.phase_draws(
                    self.student.denoiser, told, plan, self.phases[number], rng, batch.shape, roles
                )
        else:
            draws = Draws(self.rollout(batch, rng, "student" in roles, condition))
        for role in roles:
            draws.conditions[role] = condition
            draws.t[role] = self.noise.shift(policy.drawn_level(c, role, rng, draws.point))
            draws.eps[role] = rng.normal(f"{role} noise", batch.shape)
        for name in self.own_levels(roles):
            u = 1 - rng.uniform(f"{name} level")
            draws.t[name] = self.noise.shift(u if draws.point is None else draws.point.level(u))
            draws.eps[name] = rng.normal(f"{name} noise", batch.shape)
        if c.fake_score_prompt_dropout and "fake_score" in roles:
            keep = rng.uniform("fake_score dropout") >= c.fake_score_prompt_dropout
            draws.conditions["fake_score"] = dropped(condition, keep)
        if c.guidance_scale_max is not None and "student" in roles:
            draws.scale = c.guidance_scale + (c.guidance_scale_max - c.guidance_scale) * rng.uniform("guidance")
        return draws

    def pairs_alone(self, batch: Batch, rng: Rngs) -> Draws:
        """What `draw` gives where no sample of the student's is asked for."""
        assert batch.pairs is not None
        draws = Draws(batch.pairs.x)
        if self.config.policy == "trajectory":
            plan = self.plan(policy.drawn_count(self.config.steps, rng))
            draws.paired = policy.paired_step(batch.pairs, plan, self.ends, rng, self.noise)
        return draws

    def own_levels(self, roles: list[str]) -> list[str]:
        """What heads look at in the roles' turns, each at a level and with a noise of its own; others share the role's."""
        if self.discriminator is None or not self.config.own_gan_levels:
            return []
        looks = {"student": ["student gan"], "fake_score": ["fake gan", "real gan"]}
        return [name for role in roles for name in looks[role]]

    def noised(self, x: Tensor, eps: Tensor, t: Tensor, point: Point | None) -> Tensor:
        """x_t of clean samples, or of those at a point's level, noised on from there."""
        return self.noise.add(x, eps, t) if point is None else self.noise.renoise(x, eps, point.s, t)

    def rollout(self, batch: Batch, rng: Rngs, graph: bool, condition: Condition | None = None) -> Tensor:
        """The student's x0 at a step of its own sampling that is drawn once for all samples; on which input, the policy."""
        condition = condition or batch.condition
        assert condition is not None
        condition = condition.with_guidance(self.guidance)
        count, stop = drawn_step(self.config.steps, rng)
        student = self.student.denoiser
        if self.config.policy == "noised_data" and stop > 0:
            assert batch.x0 is not None
            x, t = noised_data(batch.x0, self.plan(count), stop, rng, self.noise)
        else:
            x, t = backward_simulation(student, condition, self.plan(count), stop, rng, batch.shape)
        with torch.set_grad_enabled(graph):
            return student.x0(x, t, condition)

    def loss(self, role: str, batch: Batch, draws: Draws, iteration: int) -> Iterator[Losses]:
        if self.on_pairs(iteration):
            yield self.regression(batch, draws.paired)
            return
        condition = draws.conditions.get(role, batch.condition)
        assert condition is not None
        t, eps, x0, point = draws.t[role], draws.eps[role], draws.x0.detach(), draws.point
        if role == "fake_score":
            loss = self.denoising(x0, t, eps, condition, point).mean()
            yield Losses(loss, {"loss": loss.detach()})
            if self.discriminator is not None:
                yield self.discrimination(self.discriminator, batch, draws, condition)
            return
        c = self.config
        ratio, g, scalars = None, None, {}
        if self.discriminator is not None and iteration - c.regression_warmup_steps >= c.gan_warmup_steps:
            g, logits = self.adversarial_direction(self.discriminator, x0, draws, condition)
            scalars["gan"] = adversarial.generator_loss(logits).mean()
            ratio = density_ratio(logits, t) if c.needs_ratio else None
        scale = c.guidance_scale if draws.scale is None else draws.scale
        d, r, f = self.direction(x0, t, eps, condition, scale, ratio, point)
        if g is not None:  # Diffusion-GAN has the divergence's weight
            d = d + c.gan_weight * (weighted(g, c.weight, x0, r, t, self.noise) if c.discriminator == "mean" else g)
        loss = surrogate(draws.x0, d)
        scalars |= {"spread": spread(x0), "gap": (f - r).abs().mean()}
        yield Losses(loss, {"loss": loss.detach(), **scalars})
        if c.regression_weight:
            yield self.regression(batch, draws.paired)

    def regression(self, batch: Batch, paired: tuple[Tensor, Tensor, Tensor] | None = None) -> Losses:
        """The student's one step from the noises of pairs, against what the teacher's many steps made of them (DMD).

        `paired`: a step on the way instead (`Draws.paired`).
        """
        assert batch.pairs is not None
        if paired is None:
            top = self.noise.shift(torch.tensor(self.top, device=batch.pairs.z.device))
            paired = self.scale * batch.pairs.z, top, batch.pairs.x
        x_t, t, target = paired
        told = batch.pairs.condition.with_guidance(self.guidance)
        x0 = self.student.denoiser.x0(x_t, t, told)
        rows = 1 if self.config.regression_metric == "lpips" else len(x0)
        d, distances = regression.direction(x0, target, self.distance, rows)
        return Losses(surrogate(x0, self.config.regression_weight * d), {"regression": distances.mean()})

    @cached_property
    def distance(self) -> regression.Distance:
        """Of the student's latents from the teacher's."""
        return regression.distance_of(self.config, self.config.huber_c, self.teacher.denoiser)

    def denoising(self, x0: Tensor, t: Tensor, eps: Tensor, condition: Condition, point: Point | None) -> Tensor:
        """Squared errors of the fake score on the noised samples, weighted, (B, ...)."""
        c = self.config
        x_t = self.noised(compared(x0, point), eps, t, point)
        told = self.told_fake(condition, point)
        output = self.fake_score.denoiser.guided_predict(x_t, t, told, c.fake_train_guidance_scale)
        if point is not None and c.fake_score_target == "x0_hat":
            return x0_hat_error(output, x_t, point.x0, eps, t, self.noise)
        if point is None:
            error = (output - self.noise.output(x0, eps, t)).square()
        else:
            error = subinterval_error(output, point.x, eps, point.s, t, self.noise)
        return reweighted(error, t, self.noise, c.fake_score_weight)

    def discrimination(
        self, discriminator: adversarial.Discriminator, batch: Batch, draws: Draws, condition: Condition
    ) -> Losses:
        """The student's samples against real images, one batched call; its gradient reaches the fake score, if that is read.

        Both are told the same, the sample's size included: an image's own `size_ids` would give it away.
        """
        assert batch.x0 is not None
        point = draws.point
        names = ("fake gan", "real gan") if "real gan" in draws.t else ("fake_score", "fake_score")
        (t, eps), (t_real, eps_real) = ((draws.t[n], draws.eps[n]) for n in names)
        x_t = self.noised(compared(draws.x0.detach(), point), eps, t, point)
        x_t = torch.cat([x_t, self.noise.add(batch.x0, eps_real, t_real)])
        told = concatenate([self.told(condition, point)] * 2)
        fake, real = discriminator(x_t, torch.cat([t, t_real]), told).chunk(2)
        loss = adversarial.discriminator_loss(fake, real).mean()
        right = ((fake.detach() < 0).float().mean() + (real.detach() > 0).float().mean()) / 2
        return Losses(self.config.discriminator_weight * loss, {"gan": loss.detach(), "gan_accuracy": right})

    def adversarial_direction(
        self, discriminator: adversarial.Discriminator, x0: Tensor, draws: Draws, condition: Condition
    ) -> tuple[Tensor | None, Tensor]:
        """What the GAN does to the sample at weight 1, none if its weight is 0, and the logits; without graph.

        `mean` bounds its logits. Of a sample that keeps noise it is done to the point, as the divergence's direction is.
        """
        c, point = self.config, draws.point
        t, eps = (v["student gan" if c.own_gan_levels else "student"] for v in (draws.t, draws.eps))
        told = self.told(condition, point)

        def logits(x: Tensor) -> Tensor:
            return discriminator(self.noised(x, eps, t, point), t, told)

        x = compared(x0, point)
        if not c.gan_weight:
            with torch.no_grad():
                return None, logits(x)
        return adversarial.direction(x, logits, 10.0 if c.discriminator == "mean" else None)

    def told_fake(self, condition: Condition, point: Point | None) -> Condition:
        """What the fake score is told: the scale where all networks are, or the number of the step that ended."""
        number = None if point is None else point.number
        return condition.with_guidance(self.guidance if number is None else number)

    def told(self, condition: Condition, point: Point | None = None) -> Condition:
        """What the discriminator is told: a fake score trained without prompts is not told one there, a teacher always."""
        if self.config.discriminator_features == "teacher":
            return condition.with_guidance(self.guidance)
        condition = self.told_fake(condition, point)
        return condition.unconditional() if self.config.fake_train_guidance_scale == 0 else condition

    def direction(
        self,
        x0: Tensor,
        t: Tensor,
        eps: Tensor,
        condition: Condition,
        scale: float | Tensor,
        ratio: Tensor | None = None,
        point: Point | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the divergence does to the sample, d; the teacher's x0, R; the fake score's, F. All without graph.

        `ratio`: r of each sample, (B,), for an f-divergence; none: 1 everywhere. `point`: what is noised in x0's place;
        its step moves it along with x0, by a positive factor that d leaves out.
        """
        c = self.config

        def noised(x: Tensor) -> Tensor:
            return self.noised(compared(x, point), eps, t, point)

        def teacher(x_t: Tensor) -> Tensor:
            return self.target.guided_x0(x_t, t, condition, scale)

        def fake(x_t: Tensor) -> Tensor:
            return self.fake_score.denoiser.guided_x0(x_t, t, self.told_fake(condition, point), c.fake_guidance_scale)

        def potential(x: Tensor, r: Tensor, f: Tensor) -> Tensor:
            if c.divergence == "sid":
                value = sid(x, r, f, c.sid_alpha)
            elif c.divergence == "sim":
                value = sim(x, r, f, c.distance, c.huber_c, c.distance_power)
            else:
                alpha, sigma = self.noise.levels(t, x)
                value = uni_instruct(x, r, f, self.of_ratio(ratio, t), sigma / alpha, c.exact_divergence)
            return weighted(value, c.weight, x, r, t, self.noise)

        if c.divergence not in Explicit:
            return implicit.direction(potential, x0, noised, teacher, fake, c.split_gradient)
        with torch.no_grad():
            x_t = noised(x0)
            f, r = fake(x_t), teacher(x_t)
            d = reverse_kl(r, f)
            if c.divergence == "huber_kl":
                d = huber(d, c.huber_c)
            if c.divergence == "f_distill":
                d = d * expand(self.of_ratio(ratio, t)[0], d)
            return weighted(d, c.weight, x0, r, t, self.noise), r, f

    def of_ratio(self, ratio: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, r h' and r^2 h'' of each sample, over the batch's mean of h, of a few samples over h at ratio 1, (B,)."""
        h, slope, curve = weights(torch.ones_like(t) if ratio is None else ratio, self.config.f)
        mean = h.mean() if len(h) >= FEW else H[self.config.f](torch.ones_like(h[0]))
        return h / mean, slope / mean, curve / mean

    @property
    def step_counts(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.config.steps)))

    def plan(self, steps: int) -> SamplingPlan:
        """Even levels below the first, by the consistency rule or as ODE steps; the first input is c z, c 1 or a sigma."""
        if steps not in self.config.steps:
            counts = ", ".join(map(str, self.step_counts))
            raise UserError(f"steps {steps}: this student was trained for {counts} steps")
        levels = even_levels(self.noise, steps, self.top - self.config.below_top(steps), self.phase_ends)
        rule = "ode" if self.config.policy in Noisy else "consistency"
        plan = plan_of_levels(levels, rule=rule, initial_scale=self.scale, embedded_guidance=self.guidance)
        taken = [sum(step.level <= end for end in self.taken_over) for step in plan.steps]
        numbered = (step.model_copy(update={"network": n}) for step, n in zip(plan.steps, taken, strict=True))
        return plan.model_copy(update={"steps": tuple(numbered)})

    def forwards(self) -> dict[str, dict[str, float]]:
        c = self.config
        before_last = sum(k - 1 for k in c.steps) / len(c.steps)
        rollout = {"noised_data": 0.0, "trajectory": before_last}.get(c.policy, before_last / 2)
        if c.policy == "phases":  # each a like share of the iterations
            rollout = sum(sum(phase) / len(phase) for phase in self.phases) / len(self.phases)
        return cost.calls(c, rollout, self.guidance is not None)
