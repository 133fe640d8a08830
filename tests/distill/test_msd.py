"""Several students: how prompts are split, that each is trained on its part alone, and that together they draw as each alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.app.export import export
from fewstep.app.sample import sampler_of
from fewstep.distill import msd, run
from fewstep.distill.config import ConfigError
from fewstep.distill.data import EmojiPrompts, Prompts
from fewstep.samplers.errors import UserError
from fewstep.samplers.load import load, load_student
from fewstep.samplers.manifest import read_manifest
from fewstep.samplers.plan import sample
from fewstep.samplers.router import Router, directions
from tests.distill.runs import config
from tests.pipelines import tiny_dit, tiny_stable_diffusion
from tests.samplers.students import snippet_of

PROMPTS = ["a red apple", "a cat", "zebra", "the quick brown fox", "0123456789", "sea, sky", "a cat on a hat", "jazz"]
SETTINGS: dict[str, Any] = {
    **{"method": "dmd2", "steps": [1, 2], "fake_score_updates": 1, "max_train_steps": 2, "train_batch_size": 2},
    **{"preflight": False, "train_data": None, "checkpointing_steps": 1},
}


def clustered(n: int, seed: int) -> Tensor:
    """Embeddings around seven centres of unequal weight in 32 dimensions."""
    centres = 3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    source = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05])
    return centres[torch.multinomial(weights, n, True, generator=source)] + torch.randn(n, 32, generator=source)


def test_parts_are_of_like_size():
    """Within 2% relatively where fitted; held out, n = 4,000 at 1/4, three deviations of a share are 0.02.

    Clusters alone are far off, and as they are the nearest, balance costs some of the cosine.
    """
    embeddings, weights = clustered(4000, 0), torch.full((4000,), 1 / 4000)
    router = msd.fit(embeddings, weights, 4, seed=0)
    part = router.nearest(embeddings)
    assert ((msd.shares(part, weights, 4) * 4 - 1).abs() < 0.021).all()
    held = clustered(4000, 1)
    assert ((msd.shares(router.nearest(held), weights, 4) - 0.25).abs() < 0.025).all()
    plain = Router(router.tensors | {"offsets": torch.zeros(4)})
    off = msd.shares(plain.nearest(embeddings), weights, 4) - 0.25
    assert off.abs().max() > 0.05
    rows = directions(embeddings, router.tensors["mean"])

    def cosine(part: Tensor) -> float:
        return (rows * router.tensors["centroids"][part]).sum(1).mean().item()

    assert cosine(part) < cosine(plain.nearest(embeddings))


def test_clusters_are_found():
    """Of three tight ones the directions themselves; weights count as repetitions do."""
    axes = torch.eye(3)
    source = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(axes.repeat(20, 1) + 0.02 * torch.randn(60, 3, generator=source), dim=1)
    found = msd.clusters(rows, torch.full((60,), 1 / 60), 3, seed=0)
    assert ((found @ axes.T).amax(0) > 0.999).all()
    weights = torch.tensor([3.0, 1.0, 2.0]) / 6
    pair = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]]), dim=1)
    mean = torch.nn.functional.normalize((pair * weights[:, None]).sum(0, keepdim=True), dim=1)
    assert torch.allclose(msd.clusters(pair, weights, 1, seed=0), mean)
    with pytest.raises(UserError, match="parts 3: there are only 2 different prompts"):
        msd.clusters(axes[:2].repeat(5, 1), torch.full((10,), 0.1), 3, seed=0)


def test_the_gain_of_a_split():
    """Teacher's mean |c|, c uniform in -1..1, students a c + b: one is off by Var |c| = 1/12, of two split at 0 none is.

    Parts at random leave each student's task as hard as before: 1/12 again.
    """
    c = (torch.arange(2000).double() + 0.5) / 1000 - 1

    def off(part: Tensor) -> float:
        total = 0.0
        for i in part.unique():
            own = c[part == i]
            design = torch.stack([own, torch.ones_like(own)], 1)
            fitted = torch.linalg.lstsq(design, own.abs()[:, None]).solution
            total += (design @ fitted - own.abs()[:, None]).square().sum().item()
        return total / len(c)

    router = msd.fit(c.float()[:, None], torch.full((2000,), 1 / 2000), 2, seed=0)
    assert off(torch.zeros(2000)) == pytest.approx(1 / 12, rel=1e-3)
    assert off(router.nearest(c.float()[:, None])) == pytest.approx(0, abs=1e-6)
    random = torch.randint(2, (2000,), generator=torch.Generator().manual_seed(0))
    assert off(random) == pytest.approx(1 / 12, rel=0.01)


def test_classes_are_runs_of_as_many_prompts():
    """Of 1000 four of 250; ten in three are 3, 4 and 3; of some classes alone, each part has some."""
    table = msd.blocks(torch.arange(1000), 4).tensors["class_table"]
    assert torch.equal(table, torch.arange(4).repeat_interleave(250))
    assert torch.bincount(msd.blocks(torch.arange(10), 3).tensors["class_table"]).tolist() == [3, 4, 3]
    dogs = torch.arange(151, 269)
    assert torch.bincount(msd.blocks(dogs, 4).of_keys(dogs)).tolist() == [29, 30, 29, 30]
    with pytest.raises(UserError, match="there are only 3 classes"):
        msd.blocks(torch.tensor([7, 7, 207, 7, 208]), 4)


def test_a_class_weighs_by_its_prompts():
    """Six of class 5 are a half; however uneven, none is left out. Without prompts: the nearest, of two the lower."""
    router = msd.blocks(torch.tensor([20, 5, 5, 5, 9, 5, 30, 5, 12, 13, 14, 5]), 2)
    assert router.of_keys(torch.tensor([5, 9, 12, 13, 14, 20, 30])).tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert router.of_keys(torch.tensor([0, 6, 7, 8, 29, 1000])).tolist() == [0, 0, 0, 1, 1, 1]
    for heavy in range(4):
        classes = torch.tensor([0, 1, 2, 3] + 96 * [heavy])
        assert msd.blocks(classes, 4).of_keys(torch.arange(4)).tolist() == [0, 1, 2, 3]


def test_a_part_draws_captions_as_the_data_does():
    """Repeated ones as often; the embedded prompts at their levels of detail."""
    part = msd.Part(Prompts(["a", "b", "c"]), [2, 0, 2, 2], [2, 0, 2, 2])
    assert part.captions == ["a", "c"]
    assert [part.captions[part.caption(i, 0.5)] for i in range(len(part))] == ["c", "a", "c", "c"]
    assert msd.drawn(Prompts(["x", "y"]), 0) == [0, 1]
    data = EmojiPrompts(400, 0)
    counts = Counter(data.captions[k] for k in msd.drawn(data, 0))
    assert counts[""] / 400 == pytest.approx(0.15, abs=0.054)  # three deviations of the share of empty captions


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher, and a file of prompts beside it."""
    home = tmp_path_factory.mktemp("msd")
    tiny_stable_diffusion(home / "base")
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return home


def settings(base: Path, **changes: Any) -> Any:
    own = {"teacher": str(base / "base"), "prompts": str(base / "prompts.txt"), "parts": 2}
    return config(base, **(SETTINGS | own | changes))


@pytest.fixture(scope="module", params=["lora", "full"])
def several(request: pytest.FixtureRequest, base: Path) -> Path:
    """The run's folder."""
    return run.train(settings(base, student=request.param, name=request.param))


def weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{k}": v for k, v in load_file(path).items()}
    return found


def drawn_by_each_alone(several: Path, prompts: list[str]) -> Tensor:
    """Hold a batch, in any order, to the bit to what each student makes of its rows; the part of each row."""
    denoiser, manifest = load_student(several)
    assert denoiser.router is not None
    condition, n = denoiser.encode(prompts), len(prompts)
    students = [load_student(several / f"student/student_{i}") for i in range(2)]
    for order in (torch.arange(n), torch.randperm(n, generator=torch.Generator().manual_seed(0))):
        told, own = condition[order], order.tolist()
        x = sample(denoiser, told, manifest.plan(2), own)
        part = denoiser.router.of(told)
        assert set(part.tolist()) == {0, 1}
        for i, (alone, said) in enumerate(students):
            rows = (part == i).nonzero()[:, 0]
            z = sample(alone, told[rows], said.plan(2), [own[j] for j in rows])
            assert torch.equal(x[rows], z)
            other = sample(alone, told[part != i], said.plan(2), [own[j] for j in (part != i).nonzero()[:, 0]])
            assert not torch.equal(x[part != i], other)
    return denoiser.router.of(condition)


def test_a_batch_is_drawn_as_by_each_student_alone(several: Path):
    """To the bit where a student's rows are the same, in any order of the batch; the students are not one."""
    drawn_by_each_alone(several, PROMPTS)


def test_labels_are_split_by_class(tmp_path: Path):
    """Of the classes that the data have, all in the upper half of the teacher's; another goes with the nearest."""
    tiny_dit(tmp_path / "base")
    (tmp_path / "labels.txt").write_text("700\n701\n800\n801\n")
    whole = run.train(settings(tmp_path, prompts=str(tmp_path / "labels.txt")))
    assert drawn_by_each_alone(whole, ["801", "700", "800", "701", "720"]).tolist() == [1, 0, 1, 0, 0]


def test_each_loads_alone_in_plain_diffusers(several: Path, monkeypatch: pytest.MonkeyPatch):
    """By the lines of its own card, to the same picture."""
    for i in range(2):
        folder = several / f"student/student_{i}"
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(snippet_of(folder, 2), names)
        alone, manifest = load_student(folder)
        x = sample(alone, alone.encode(names["prompts"]), manifest.plan(2), range(len(names["prompts"])))
        picture = (alone.decode(x)[0] * 255).round()
        found = torch.from_numpy(np.array(names["image"])).permute(2, 0, 1)
        assert (picture - found).abs().max() <= 1
        (folder / "image.png").unlink()


def test_the_command_line_draws_with_all(several: Path):
    """What `fewstep sample RUN` shows of a mixed batch is what the students draw."""
    images = sampler_of(str(several), 2, None, None).images(PROMPTS, range(8))
    denoiser, manifest = load_student(several)
    x = sample(denoiser, denoiser.encode(PROMPTS), manifest.plan(2), range(8))
    assert torch.allclose(images, denoiser.decode(x), atol=1e-4)


@pytest.mark.parametrize("several", ["lora"], indirect=True)
def test_a_part_is_the_plain_method_on_its_prompts(several: Path, base: Path):
    """Bit for bit, though other parts were trained before and after it, on one base."""
    kind = read_manifest(several / "student").kind
    denoiser, _ = load_student(several)
    assert denoiser.router is not None
    part = denoiser.router.of(denoiser.encode(PROMPTS))
    for i in range(2):
        own = Prompts([p for p, k in zip(PROMPTS, part.tolist(), strict=True) if k == i])
        plain = run.train(settings(base, student=kind, name=f"plain-{kind}-{i}", parts=1), data=own)
        found, wanted = weights(several / f"student/student_{i}"), weights(plain / "student")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k], v) for k, v in wanted.items())
        assert not (plain / "student/router.safetensors").exists()


class Captioned(Prompts):
    """A plain colour for each prompt, which says which it is."""

    has_images = True

    def __init__(self, captions: list[str]):
        super().__init__(captions)
        self.buckets = [(16, 16)]

    def image(self, i: int) -> Tensor:
        return torch.full((3, 16, 16), PROMPTS.index(self.captions[i]) / len(PROMPTS))

    def sizes(self, i: int) -> list[int]:
        return [16, 16, 0, 0, 16, 16]


def test_a_gan_sees_images_of_its_part_alone(base: Path):
    """An image goes with its caption: each student is, bit for bit, that of a run on these images."""
    gan = {"gan_weight": 0.1, "train_data": "in memory", "prompts": None}
    whole = run.train(settings(base, name="gan", **gan), data=Captioned(PROMPTS))
    denoiser, _ = load_student(whole)
    assert denoiser.router is not None
    part = denoiser.router.of(denoiser.encode(PROMPTS)).tolist()
    for i in range(2):
        own = Captioned([p for p, k in zip(PROMPTS, part, strict=True) if k == i])
        plain = run.train(settings(base, name=f"gan-{i}", parts=1, **gan), data=own)
        found, wanted = weights(whole / f"student/student_{i}"), weights(plain / "student")
        assert all(torch.equal(found[k], v) for k, v in wanted.items())


@pytest.mark.parametrize("several", ["full"], indirect=True)
def test_an_interrupted_run_goes_on_in_its_part(base: Path, several: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed before the second part: the first is not trained again, and the whole is that of a straight run."""
    kind = read_manifest(several / "student").kind
    made = settings(base, student=kind, name=f"killed-{kind}")
    train = run.train

    def dies(config: Any, *args: Any, **kwargs: Any) -> Path:
        if config.name == "part_1":
            raise KeyboardInterrupt
        return train(config, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(run, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            msd.train_parts(made, 2)
    first = made.run_dir / "parts/part_0/checkpoints/step-000002/manifest.json"
    written = first.stat().st_mtime_ns
    with pytest.raises(UserError, match="holds a run already"):
        run.train(made)
    run.train(made, resume=True)
    assert first.stat().st_mtime_ns == written
    found, wanted = weights(made.run_dir / "student"), weights(several / "student")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_students_start_as_those_of_a_run_of_several(base: Path, tmp_path: Path):
    """The authors' last stage: each goes on from its own student, with its own prompts, whatever else is drawn now."""
    first = run.train(settings(base, student="full", name="first"))
    still = {"student": "full", "student_init": str(first), "max_train_steps": 1, "learning_rate": 1e-12}
    second = run.train(settings(base, **still, output_dir=str(tmp_path), name="second", seed=7))
    routers = [Router.load(of / "student/router.safetensors") for of in (first, second)]
    assert routers[0].sha256 == routers[1].sha256
    before, after = (weights(of / "student") for of in (first, second))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-9)
    unet = [key for key in before if "unet" in key]
    assert any(not torch.equal(before[key], before[key.replace("student_0", "student_1")]) for key in unet)
    with pytest.raises(UserError, match=r"student_init: .*/first holds 2 students, and starts as many; set parts: 2"):
        run.train(settings(base, **still, output_dir=str(tmp_path), name="third", parts=3))
    Router(routers[0].tensors | {"offsets": torch.ones(2)}).save(second / "router.safetensors")
    with pytest.raises(UserError, match=r"not the router of .*/first; start anew under another name="):
        run.train(settings(base, **still, output_dir=str(tmp_path), name="second", seed=7), resume=True)


def test_what_does_not_belong_together_is_refused(several: Path, tmp_path: Path):
    """Another router, students that changed places, a network where there are several."""
    whole = tmp_path / "student"
    shutil.copytree(several / "student", whole)
    router = Router.load(whole / "router.safetensors")
    Router(router.tensors | {"offsets": router.tensors["offsets"] + 1e-3}).save(whole / "router.safetensors")
    with pytest.raises(UserError, match="not the router that these students were trained with"):
        load_student(whole)
    router.save(whole / "router.safetensors")
    (whole / "student_0").rename(whole / "other")
    (whole / "student_1").rename(whole / "student_0")
    (whole / "other").rename(whole / "student_1")
    with pytest.raises(UserError, match="student_0: trained for part 1, or with another router"):
        load_student(whole)
    with pytest.raises(UserError, match="several students, no one network"):
        load(several)
    with pytest.raises(UserError, match="one at a time is exported"):
        export(str(several), "fused", tmp_path / "out")


def test_the_folder_is_exported_whole(several: Path, tmp_path: Path):
    """And loads from its new place."""
    (line,) = export(str(several), "diffusers", tmp_path / "out")
    assert "2 students and their router" in line
    assert load_student(tmp_path / "out")[0].networks.keys() == {"student_0", "student_1"}


def test_a_run_of_one_and_a_run_of_several_share_no_folder(base: Path, several: Path, tmp_path: Path):
    """Whichever came first stays as it is; so does the config of a run that is resumed with other values."""
    one = run.train(settings(base, parts=1, name="one", output_dir=str(tmp_path)))
    kept = {p: p.read_bytes() for p in (one / "config.yaml", one / "student/fewstep.json", several / "config.yaml")}
    for resume in (False, True):
        with pytest.raises(UserError, match=r"one: holds a run of one student; name=OTHER starts another"):
            run.train(settings(base, name="one", output_dir=str(tmp_path)), resume)
        with pytest.raises(UserError, match=r"holds a run of several students \(parts\); name=OTHER starts another"):
            run.train(settings(base, parts=1, name=several.name), resume)
    with pytest.raises(
        UserError, match=r"cannot be resumed with other values of .*learning_rate \(was 0.01, now 0.5\)"
    ):
        run.train(settings(base, name=several.name, learning_rate=0.5), resume=True)
    with pytest.raises(UserError, match="cannot be written"):
        run.train(settings(base, name="x", output_dir="/proc/nowhere"))
    assert all(p.read_bytes() == was for p, was in kept.items())


def test_a_report_of_several_is_looked_at_first_and_made_again_when_they_went_on(base: Path, tmp_path: Path):
    told = {"name": "reported", "output_dir": str(tmp_path), "report_num": 4, "report_teacher_steps": [1]}
    with pytest.raises(ConfigError, match="report_steps: 3 is not a step count of this student"):
        run.train(settings(base, **told, report_steps=[3]))
    assert not (tmp_path / "reported").exists()
    report = run.train(settings(base, **told)) / "report.json"
    first = report.read_text()
    run.train(settings(base, **told), resume=True)
    assert report.read_text() == first
    run.train(settings(base, **told, max_train_steps=3), resume=True)
    assert (json.loads(first)["iteration"], json.loads(report.read_text())["iteration"]) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": 9}, "parts 9: there are only 8 different prompts"),
        ({"parts": 3}, "parts 3: the prompts fall into parts of unlike size, .*; take fewer parts"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], said: str, base: Path):
    """Eight prompts in three parts are 3, 3 and 2 at best: a quarter off."""
    with pytest.raises((ConfigError, UserError), match=said):
        run.train(settings(base, name="refused", **changes))
