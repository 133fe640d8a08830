"""Each network that judges, through the command: figures are those of the images on disk by its plain use, or one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.metrics.clips import read_clip
from fewstep.metrics.features import extract
from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.images import read_image
from tests.app.conftest import run
from tests.metrics.tiny_clip import noise_images, save_tiny_clip
from tests.pipelines import tiny_wan

# the published file of I3D is TorchScript
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
PROMPTS = ("a cat", "a dog")
STILL = "fd_dino,recall,lpips_to_teacher,diversity_lpips,diversity_lpips_ratio,aesthetic,hps,image_reward"


def save(frames: torch.Tensor, folder: Path) -> Path:
    """Images (N, 3, H, W) as files of a folder."""
    folder.mkdir(parents=True)
    for i, image in enumerate(frames):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of small random networks: clip/, dino/, alex.pth, head.pth, i3d.pt, raft.pth; and two packages."""
    from torchvision.models import alexnet
    from torchvision.models.optical_flow import raft_small
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("networks")
    save_tiny_clip(folder / "clip", seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
        Dinov2Model(Dinov2Config(**size)).save_pretrained(folder / "dino")
        torch.save({"weight": torch.randn(1, 24), "bias": torch.ones(1)}, folder / "head.pth")
        torch.save(raft_small().state_dict(), folder / "raft.pth")
        with torch.device("meta"):
            alex = alexnet().features
        state = alex.to_empty(device="cpu").state_dict()
        torch.save({f"features.{k}": 0.05 * torch.randn(v.shape) for k, v in state.items()}, folder / "alex.pth")
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "dino")
    torch.jit.script(Script()).save(str(folder / "i3d.pt"))
    torch.save({"state_dict": {"weight": torch.tensor(3.0)}}, folder / "w.pt")
    packages = folder / "packages"
    (packages / "hpsv2").mkdir(parents=True)
    (packages / "hpsv2" / "__init__.py").write_text("")
    (packages / "hpsv2" / "img_score.py").write_text(
        "import torch\n\n"
        "class Network(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n        self.weight = torch.nn.Parameter(torch.zeros(()))\n"
        "    def forward(self, pictures, words):\n"
        "        return {'image_features': self.weight * pictures, 'text_features': words}\n\n"
        "device, model_dict = 'cpu', {}\n"
        "def initialize_model():\n"
        "    prepare = lambda x: torch.tensor([float(x.getpixel((3, 5))[0])])\n"
        "    model_dict.update(model=Network(), preprocess_val=prepare)\n"
        "def get_tokenizer(name):\n"
        "    assert name == 'ViT-H-14'\n"
        "    return lambda prompts: torch.tensor([[float(len(p))] for p in prompts])\n"
    )
    (packages / "ImageReward.py").write_text(
        "class Model:\n    def score(self, prompt, picture):\n        return picture.getpixel((3, 5))[1] - len(prompt)\n"
        "def load(name):\n    assert name == 'ImageReward-v1.0'\n    return Model()\n"
    )
    return folder


class Script(torch.nn.Module):
    """What the published TorchScript file is called with."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return torch.stack([x.mean((1, 2, 3, 4)), (x[:, :, 1:] - x[:, :, :-1]).abs().mean((1, 2, 3, 4))], 1)


def options(networks: Path, out: Path, metrics: str, *more: object) -> tuple[object, ...]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return (
        *("--metrics", metrics, "--out", out, "--steps", 1, "--teacher-steps", 2, "-n", 4, "--prompts", prompts),
        *(
            "--per-prompt",
            2,
            "--guidance-scale",
            1,
            "--clip-model",
            networks / "clip",
            "--dino-model",
            networks / "dino",
        ),
        *("--manifold-space", "dino", "--lpips-weights", networks / "alex.pth", "--hps-weights", networks / "w.pt"),
        *("--aesthetic-weights", networks / "head.pth", "--i3d-weights", networks / "i3d.pt"),
        *("--raft-weights", networks / "raft.pth", *more),
    )


def reported(out: Path, row: int = -1) -> dict[str, Any]:
    report = json.loads(out.read_text())
    return {name: figure["value"] for name, figure in report["rows"][row]["metrics"].items()}


def test_still_images(teacher: Path, networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """DINOv2, LPIPS, an aesthetic head, and packages that answer with a pixel and the length of the prompt."""
    from fewstep.metrics.aesthetic import aesthetic, load_head
    from fewstep.metrics.clip import Clip
    from fewstep.metrics.dino import Dino
    from fewstep.metrics.lpips import Lpips
    from fewstep.metrics.manifolds import manifolds

    monkeypatch.syspath_prepend(networks / "packages")
    out, reference = tmp_path / "report.json", save(noise_images(8, 64, 64), tmp_path / "reference")
    more = ("--reference", reference, "-n", 8, "--per-prompt", 4, "--height", 48, "--width", 64)
    answer = run("evaluate", teacher, *options(networks, out, STILL, *more))
    assert answer.code == 0, answer.err
    for name in ("hpsv2", "hpsv2.img_score", "ImageReward"):
        sys.modules.pop(name)
    many, one = (
        torch.stack([read_image(f) for f in sorted(next(out.with_suffix(".images").glob(f"*/{s}-*")).glob("*.png"))])
        for s in ("2-steps", "1-step")
    )
    assert one.shape == many.shape == (8, 3, 48, 64)
    prompts = next(out.with_suffix(".images").glob("*/1-step-*/prompts.txt")).read_text().splitlines()
    assert sorted(prompts) == sorted(4 * PROMPTS)
    dino, lpips = Dino(str(networks / "dino")), Lpips("alex", networks / "alex.pth")
    features, real = dino(one), extract(dino, reference)

    def variety(images: torch.Tensor) -> float:
        pairs = [(a, b) for a in range(8) for b in range(a) if prompts[a] == prompts[b]]
        return sum(lpips(images[[a]], images[[b]]).item() for a, b in pairs) / len(pairs)

    lengths = torch.tensor([float(len(p)) for p in prompts])
    want = {
        "fd_dino": frechet_distance(features, real),
        "lpips_to_teacher": lpips(one, many).mean().item(),
        "diversity_lpips": variety(one),
        "diversity_lpips_ratio": variety(one) / variety(many),
        "aesthetic": aesthetic(Clip(str(networks / "clip"))(one), load_head(networks / "head.pth")).mean().item(),
        "hps": (3 * one[:, 0, 5, 3].float() * lengths).mean().item(),
        "image_reward": (one[:, 1, 5, 3] - lengths).mean().item(),
    }
    found = reported(out)
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-4)
    assert found["recall"] == pytest.approx(manifolds(features, real)["recall"][0])
    judged = json.loads(out.read_text())["networks"]
    assert {"dino", "clip", "lpips"} <= set(judged)


def test_clips_of_a_pipeline_and_of_a_folder(networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fewstep.metrics.clip import Clip
    from fewstep.metrics.video import I3D, consistency, frame_features, motion

    monkeypatch.setattr("fewstep.app.evaluate.CACHE", tmp_path / "cache")
    tiny_wan(tmp_path / "wan")
    for c in range(3):
        save(noise_images(13, 64, 64, seed=c), tmp_path / "reference" / f"{c}")
    out, npz = tmp_path / "report.json", tmp_path / "i3d.npz"
    size = ("--height", 64, "--width", 64, "--num-frames", 13)
    command = options(
        networks, out, "fvd,motion,consistency,psnr_to_teacher", "--reference", tmp_path / "reference", *size
    )
    answer = run("evaluate", tmp_path / "wan", *command)
    assert answer.code == 0, answer.err
    drawn = next(out.with_suffix(".images").glob("*/1-step-*"))
    clips, real = (
        torch.stack([read_clip(c) for c in sorted(f.iterdir()) if c.is_dir()]) for f in (drawn, tmp_path / "reference")
    )
    assert clips.shape == (4, 13, 3, 64, 64)
    i3d = I3D(networks / "i3d.pt")
    want = {
        "fvd": frechet_distance(i3d(clips), i3d(real)),
        "motion": motion(clips).mean().item(),
        "consistency": consistency(frame_features(Clip(str(networks / "clip")), clips)).mean().item(),
    }
    found = reported(out)
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-5)
    assert found["psnr_to_teacher"] > 0

    # the row's folder is a source too; the same reference as a file, and from the cache: only the row is judged
    said = run("stats", tmp_path / "reference", "--out", npz, "--space", "i3d", "--i3d-weights", networks / "i3d.pt")
    assert (said.code, said.out) == (0, f"{npz}: 3 clips, {i3d.name}-13-frames\n")
    judged, real_features = [], I3D._features
    monkeypatch.setattr(I3D, "_features", lambda self, x: judged.append(len(x)) or real_features(self, x))
    for reference in (npz, tmp_path / "reference"):
        answer = run("evaluate", drawn, *options(networks, tmp_path / "b.json", "fvd", "--reference", reference))
        assert answer.code == 0, answer.err
        assert reported(tmp_path / "b.json") == pytest.approx({"fvd": want["fvd"]}, rel=1e-5)
    assert sum(judged) == 2 * len(clips)


def test_frames_and_optical_flow_of_short_clips(
    networks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """RAFT has no tiny form: few frames, and few clips. In place of Inception, whose distance takes seconds, a small CLIP.

    At 8 frames a second a step moves beyond 6 * 32 / 256 pixels, and at a rate of 0.05 beyond 160 times as many.
    """
    from fewstep.metrics.clip import Clip
    from fewstep.metrics.video import Raft, dynamic, flow_motion

    monkeypatch.setattr("fewstep.distill.judges.Judges.inception", property(lambda judges: judges.clip))
    monkeypatch.setattr("fewstep.app.evaluate.CACHE", tmp_path / "cache")
    out = tmp_path / "report.json"
    for c in range(2):
        save(noise_images(3, 32, 40, seed=9 + c), tmp_path / "short" / f"{c}")
        save(noise_images(4, 32, 40, seed=c), tmp_path / "real" / f"{c}")
    command = options(networks, out, "frame_fid,flow_motion,dynamic_degree", "--reference", tmp_path / "real")
    answer = run("evaluate", tmp_path / "short", *command, "--clip-fps", 0.05)
    assert answer.code == 0, answer.err
    short, real = (torch.stack([read_clip(tmp_path / f / f"{c}") for c in range(2)]) for f in ("short", "real"))
    raft, clip = Raft(networks / "raft.pth"), Clip(str(networks / "clip"))
    found = reported(out)
    frames = [clip(x.flatten(0, 1)) for x in (short, real)]
    assert found["frame_fid"] == pytest.approx(frechet_distance(*frames), rel=1e-5)
    # its error leaves out a clip, and not every tenth frame
    a, b = (frechet_distance(clip(x), frames[1]) for x in short)
    error = json.loads(out.read_text())["rows"][0]["metrics"]["frame_fid"]["stderr"]
    assert error == pytest.approx(abs(a - b) / 2, rel=1e-4)
    assert found["flow_motion"] == pytest.approx(flow_motion(raft, short).mean().item(), rel=1e-4)
    assert 0.75 < found["flow_motion"] < 120
    assert found["dynamic_degree"] == dynamic(raft, short, 0.05).mean().item() == 0  # 1 at the rates that are defaults


@pytest.mark.parametrize(
    ("metrics", "more", "parts"),
    [
        ("hps", [], ["hps: needs the package hpsv2", "run: pip install hpsv2"]),
        ("image_reward", [], ["image_reward: needs the package image-reward", "run: pip install image-reward"]),
        ("fd_dino", ["--dino-model", "nowhere"], ["the model nowhere is not on this machine", "--dino-model FOLDER"]),
        ("lpips_to_teacher", ["--lpips-weights", "no.pth"], ["lpips: no file no.pth", "curl", "--lpips-weights FILE"]),
        ("fvd", ["--i3d-weights", "no.pt"], ["i3d: no file no.pt; run: curl", "--i3d-weights FILE"]),
        ("flow_motion", ["--raft-weights", "no.pth"], ["raft: no file no.pth; run: curl", "--raft-weights FILE"]),
        ("dynamic_degree", ["--clip-fps", "0"], ["--clip-fps 0: must be above 0"]),
        ("dynamic_degree", [], ["metric dynamic_degree: needs clips, and these are images"]),
    ],
)
def test_what_is_missing_is_one_line(
    teacher: Path,
    networks: Path,
    tmp_path: Path,
    metrics: str,
    more: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    for name in ("hpsv2", "hpsv2.img_score", "ImageReward"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    command = options(networks, tmp_path / "report.json", metrics, "--reference", networks, *more)
    answer = run("evaluate", teacher, *command)
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1), answer.err
    for part in parts:
        assert part in answer.err


def test_clips_of_two_lengths_have_no_fvd(networks: Path, tmp_path: Path):
    for folder, frames in (("a", (10, 10)), ("b", (11, 11)), ("mixed", (10, 11))):
        for c, n in enumerate(frames):
            save(noise_images(n, 16, 16, seed=c), tmp_path / folder / f"{c}")
    for source, reference, line in (
        ("a", "b", "-10-frames cannot be compared with a reference of i3d-"),
        ("mixed", "a", "fvd compares clips of one length; got i3d-"),
        ("a", "mixed", "fvd compares clips of one length; got 10 and 11 frames"),
    ):
        command = options(networks, tmp_path / "report.json", "fvd", "--reference", tmp_path / reference)
        answer = run("evaluate", tmp_path / source, *command)
        assert (answer.code, answer.out) == (2, ""), answer.err
        assert line in answer.err.splitlines()[-1]
