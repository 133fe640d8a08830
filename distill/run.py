"""`train(config)`: one run from config to artifact."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, set_seed

from fewstep.distill import cache, efficiency, in_training, report, safeguards, sharding
from fewstep.distill import data as data_sets
from fewstep.distill.alarm import sample_alarm
from fewstep.distill.batches import Batches
from fewstep.distill.captions import read_captions
from fewstep.distill.config import ConfigError, TrainConfig, load_config
from fewstep.distill.data import DataSet
from fewstep.distill.distiller import Distiller
from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.files import source
from fewstep.distill.interrupt import Interrupted
from fewstep.distill.methods import distiller, why_not
from fewstep.distill.networks import Networks
from fewstep.distill.objectives import regression
from fewstep.distill.pairs import make_pairs
from fewstep.distill.record import Record, check_tracker, locked, pixels_shape
from fewstep.distill.student_start import said, starts_of, student_start
from fewstep.distill.trainer import Trainer
from fewstep.samplers.denoisers.base import Denoiser
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import class_of, denoiser_of, family, index_of, load, parts, resolve
from fewstep.samplers.manifest import Manifest, fingerprint, holds_lora
from fewstep.samplers.skeleton import networks as networks_alone
from fewstep.samplers.stock import stock
from fewstep.samplers.student import save_student

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def refuse(config: TrainConfig) -> None:
    """Refuse, before any weight loads, what the method needs and the config lacks."""
    needs = distiller(config.method).needs_of(config)
    if "images" in needs and not config.has_images:
        raise ConfigError(
            f"config: train_data: missing; method {config.method} learns from images or clips with captions"
        )
    if "prompts" in needs and config.prompts is None and not config.has_images:
        raise ConfigError(f"config: prompts: missing; method {config.method} needs prompts (or train_data's captions)")
    if "student_config" in needs and config.student_config is None and config.student_init is None:
        raise ConfigError(
            f"config: student_config: missing; method {config.method} trains a network of another size, such as "
            "{layers_per_block: 1} of a UNet or {num_layers: 14} of a transformer"
        )
    if config.student_init is not None:
        class_of(starts_of(config)[0])
    if parts(config.teacher)[1]:
        raise ConfigError(
            "config: teacher: a pipeline with a LoRA, or another network; save it whole first (fuse_lora and save_pretrained "
            "of diffusers), since the student's card loads one pipeline"
        )
    if getattr(config, "policy", None) == "phases" and holds_lora(resolve(config.teacher)):
        raise ConfigError(
            "config: teacher: a LoRA student, on which phases, LoRAs too, cannot be loaded; export it fused"
        )
    if config.aspect_ratio_buckets and not config.has_images:
        raise ConfigError("config: aspect_ratio_buckets: sorts images; give train_data or dataset_name")
    if not config.has_images and config.prompts not in (None, "embedded:emoji"):
        read_captions(config.prompts)
    if isinstance(config, DistributionMatchingConfig) and config.decodes and config.regression_metric == "lpips":
        regression.lpips(config.lpips_net, config.lpips_weights)
    check_tracker(config.report_to)
    efficiency.refuse(config)
    sharding.refuse(config)
    if config.quantization_config is not None:
        loads = family(class_of(config.teacher, config.revision)).takes_lora
        if not loads or holds_lora(resolve(config.teacher)):
            raise ConfigError(
                "config: quantization_config: this teacher's pipeline takes no LoRA beside its weights, where it would have to "
                "be added, and packed ones cannot be; base_dtype: bf16 halves the base without it"
            )


def refuse_backbone(config: TrainConfig, backbone: type[Denoiser], networks: Iterable[str] | None = None) -> None:
    """Refuse what this family of teachers has not; `networks` are those of one in memory, else its index names them."""
    if config.num_frames is not None and not backbone.clips:
        raise ConfigError(f"config: num_frames: {config.num_frames}; this teacher makes images, leave it out")
    own = list(networks or backbone.network_names)
    if networks is None and len(own) > 1 and not holds_lora(resolve(config.teacher)):
        index = index_of(config.teacher, config.revision)
        own = [name for name in own if all(index.get(name) or [None])]
    if reason := why_not(config, backbone, own):
        raise ConfigError(f"config: method {config.method}: {reason}")


def still(record: Record, weights: Mapping[str, int], teacher: Denoiser) -> None:
    """`check_unmoved`, after which a run whose teacher moved is never gone on with."""
    try:
        safeguards.check_unmoved(weights, teacher)
    except UserError:
        record.teacher_moved()
        raise


def methods_distiller(config: TrainConfig, networks: Networks) -> Distiller:
    """The Distiller of a config over its networks."""
    return distiller(config.method)(config, networks)  # type: ignore[call-arg]


def networks_of(config: TrainConfig, teacher: Denoiser) -> Networks:
    """The factory of a config's roles; UserError for a student that cannot stand in the teacher's place."""
    c, start = config, student_start(config, teacher)
    beside = getattr(c, "fake_score", None)
    return Networks(teacher, c.student, c.rank, c.lora_alpha, c.target_modules, c.seed, start, beside)


def train(
    config: TrainConfig | Mapping[str, Any] | str | Path,
    resume: bool = False,
    teacher: Denoiser | DiffusionPipeline | None = None,
    data: DataSet | None = None,
) -> Path:
    """Train a student and write the run's folder.

    Args:
        config: a checked config, a mapping, a path, or the name of a shipped one.
        resume: continue from the newest whole checkpoint, if there is one.
        teacher: a pipeline, or a denoiser around one, already in memory, instead of loading the config's. That is still
            the name by which the student finds its base again: where the pipeline lies, or will. The pipeline is given
            over: a LoRA leaves its adapters on it.
        data: a data set, instead of the config's.

    Returns:
        The run's folder; the student is in its `student/`.

    Raises:
        ConfigError, UserError: what is wrong and what would be right, in one line each.
    """
    if not isinstance(config, TrainConfig):
        config = load_config(config)
    if teacher is not None and not isinstance(teacher, Denoiser):
        teacher = denoiser_of(teacher)
    if (parts := getattr(config, "parts", 1)) > 1:
        from fewstep.distill.msd import train_parts

        if teacher is not None:
            raise ConfigError("config: parts: the teacher is loaded anew for each; name it by its source")
        train_parts(config, parts, resume, data)
        if config.report_num is not None and not (resume and report.current(config)):
            report.report_run(config.run_dir)
        return config.run_dir
    with ExitStack() as held:
        record, trained = _fit(config, resume, teacher, data, held)
    # from what lies in the folder, once training's networks are out of memory: some hold one another
    gc.collect()
    if record.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    due = trained or not report.current(config)
    if config.report_num is not None and due and record.accelerator.is_main_process:
        report.report_run(config.run_dir, record.say)
    return config.run_dir


def _fit(
    config: TrainConfig, resume: bool, teacher: Denoiser | None, data: DataSet | None, held: ExitStack
) -> tuple[Record, bool]:
    """Train and save the student; False where a resumed run had nothing left to do. `held` has what ends after it."""
    refuse(config)
    backbone = family(class_of(config.teacher, config.revision)) if teacher is None else type(teacher)
    refuse_backbone(config, backbone, None if teacher is None else teacher.networks)
    files = source(config, backbone.clips) if data is None else None
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_dir=str(config.run_dir),
        # the others wait while one process caches, writes or draws, which may take longer than torch's ten minutes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    efficiency.keep_freed_memory(accelerator.device)
    sharding.refuse_launch(config, accelerator)
    bare = teacher.networks.values() if teacher is not None else None
    efficiency.refuse_here(
        config, accelerator, lambda: bare or networks_alone(config.teacher, config.revision, backbone.network_names)
    )
    record = Record(config, accelerator)
    if accelerator.is_main_process:
        held.enter_context(locked(config.run_dir))
    record.open(resume)
    alone, on_pairs = (getattr(config, key, 0) for key in ("fake_score_warmup_steps", "regression_warmup_steps"))
    if alone >= config.max_train_steps and not on_pairs:
        record.say(
            f"fake_score_warmup_steps {alone}: the student learns nothing in {config.max_train_steps} iterations"
        )
    if resume and record.finished():
        record.say(f"{config.run_dir}: nothing left to train")
        return record, False
    set_seed(config.seed)  # for modules that initialise themselves; every draw of the loop has its own key
    if teacher is None:
        arguments = efficiency.loading(config, backbone.network_names)
        teacher = load(config.teacher, config.revision, config.variant, **arguments)
    else:
        efficiency.cast_base(config, teacher)
    sharded = config.sharding_strategy == "full_shard"
    shape = pixels_shape(config, teacher)
    teacher = teacher.at(shape)
    teacher.to(accelerator.device)
    networks = networks_of(config, teacher)
    if networks.student is not teacher:
        record.say(said(config, networks.student, teacher))
    given = data is not None  # whose captions no report could read again
    if data is None:
        pixels, frames = teacher.pixels(config.height, config.width), teacher.frames(config.num_frames)
        data = data_sets.data_set(config, pixels, frames, files)
    record.same_data(data.captions, len(data))
    buckets = data.buckets if config.aspect_ratio_buckets else ()
    shapes = [teacher.latent_shape(*size, config.num_frames) for size in buckets]
    if shapes and teacher.pipeline.scheduler.config.get("use_dynamic_shifting"):
        raise ConfigError("config: aspect_ratio_buckets: this teacher's shift depends on the size; train at one size")
    reference = None
    if config.preflight:
        scale, size = getattr(config, "guidance_scale", 1.0), (config.height, config.width, config.num_frames)
        reference = safeguards.preflight(teacher, data.captions, config.negative_prompt, scale, size, record.say)
    weights = safeguards.checksums(teacher)
    mark = fingerprint(teacher if config.quantization_config is None else efficiency.unquantised(config, backbone))
    record.same_teacher(mark)
    keep_encoder = getattr(config, "train_text_encoder", False)
    with accelerator.main_process_first():
        condition = None if keep_encoder else cache.conditions(config, teacher, data.captions)
        needs = distiller(config.method).needs_of(config)
        latents = cache.latents(config, teacher, data, record.say) if "images" in needs else None
        shown = None
        if config.validation_prompts and not keep_encoder:
            shown = cache.conditions(config, teacher, config.validation_prompts)[range(len(config.validation_prompts))]
        judged = None
        if config.eval_steps:
            judged = in_training.prompts_of(config, teacher, data.captions)
    pairs = None
    if isinstance(config, DistributionMatchingConfig) and "pairs" in needs:
        assert condition is not None
        pairs = make_pairs(config, teacher, data, condition, shape, accelerator, record.say)
    if config.offload_encoders:
        teacher.rest("cpu", keep=("text_encoder",) if keep_encoder else ())
    if sharded:
        teacher.to("cpu")  # roles are made in main memory, and go to the device block by block
        sharding.together(teacher, accelerator.device)
    method = methods_distiller(config, networks)
    report.check(config, method.step_counts, teacher, None if given else data.captions)
    plans = {k: method.plan(k) for k in method.step_counts}
    stock(method.roles()["student"].denoiser, plans)  # what plain diffusers cannot sample is refused before training
    for line in efficiency.apply(config, method.roles(), accelerator.device):
        record.say(line)
    if shown is not None:
        record.previews(networks.teacher().denoiser, shown)
    student = method.roles()["student"].denoiser
    skeletons = sharding.skeleton(student) if sharded else {}
    if sharded:
        sharding.shard(method.roles().values(), networks.base, accelerator.device)
    batches = Batches(
        data,
        shape,
        condition,
        latents,
        config.seed,
        config.train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        shapes,
        pairs,
    )

    def ask(of: Denoiser) -> None:
        one = of.encode(data.captions[:1]) if condition is None else condition[range(1)]
        one = one.to(accelerator.device)
        one = one.with_guidance(1.0) if of.takes_guidance else one
        of.predict(torch.zeros(1, *shape, device=accelerator.device), torch.tensor(0.5), one)

    for line in efficiency.proven(config, method.roles(), ask):
        record.say(line)
    trainer = Trainer(config, accelerator, method, batches, record)
    if config.collapse_alarm:
        trainer.alarm.reference, trainer.samples = reference, sample_alarm(config, method, batches, record)
    if judged is not None and accelerator.is_main_process:
        steps = in_training.steps_of(config, method.step_counts)
        trainer.judge = in_training.InTraining(config, *judged, plans[steps], shape)
    if resume:
        trainer.resume()
    try:
        trainer.run()
    except Interrupted:
        still(record, weights, teacher)
        raise
    still(record, weights, teacher)
    with trainer.averaged():
        exported = student
        if sharded:
            exported = sharding.gathered(student, skeletons, accelerator.is_main_process)
        if accelerator.is_main_process:
            manifest = Manifest(
                base=config.teacher,
                revision=config.revision,
                variant=config.variant,
                pipeline=type(teacher.pipeline).__name__,
                fingerprint=mark,
                method=config.method,
                kind=config.student,
                iteration=trainer.iteration,
                plans=plans,
                height=config.height,
                width=config.width,
                num_frames=config.num_frames,
            )
            save_student(config.run_dir / "student", exported, manifest)
        with trainer.attention():
            record.preview(method, student, trainer.iteration)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    record.forget()
    accelerator.free_memory()  # it holds the optimisers, and they the weights and their moments
    return record, True
