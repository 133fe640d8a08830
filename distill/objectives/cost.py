"""What an iteration of the distribution matching family costs."""

from __future__ import annotations

from fewstep.distill.family_config import DistributionMatchingConfig, Explicit


def calls(config: DistributionMatchingConfig, rollout: float, told_guidance: bool) -> dict[str, dict[str, float]]:
    """Expected rows through networks over the batch, by the roles that step: without graph `forward`, with `backward`.

    Args:
        config: the method's.
        rollout: of the student without graph, before the call that is trained.
        told_guidance: the networks take the scale as an input: a guided teacher is one call.
    """
    teacher, fake, trained = (
        1 if scale in (0, 1) else 2
        for scale in (config.guidance_scale, config.fake_guidance_scale, config.fake_train_guidance_scale)
    )
    teacher = 2 if config.guidance_scale_max is not None else teacher
    teacher = 1 if told_guidance else teacher
    explicit = config.divergence in Explicit
    scores = (teacher + fake, 0) if explicit else (config.split_gradient * fake, teacher + fake)
    look = config.discriminates  # a call that stops at the deepest block counts as one
    graph = look and config.gan_weight > 0
    regressed = config.regression_weight > 0  # one call of the student on pairs
    still = 2 * look * (config.discriminator_features == "teacher")  # fakes and real ones, for heads alone
    trained += 2 * look - still
    both = {
        "forward": rollout + scores[0] + look - graph + still,
        "backward": 1 + regressed + scores[1] + graph + trained,
    }
    alone = {"forward": rollout + 1 + still, "backward": trained}
    counts = {"student and fake_score": both, "fake_score": alone}
    return counts | ({"student": {"forward": 0.0, "backward": 1.0}} if config.regression_warmup_steps else {})
