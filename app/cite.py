"""The papers behind a run, as BibTeX."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fewstep.distill.config import ConfigError

PAPERS = {
    "cm": (
        "2303.01469",
        "2023",
        "Consistency Models",
        ("Yang Song", "Prafulla Dhariwal", "Mark Chen", "Ilya Sutskever"),
    ),
    "ladd": (
        "2403.12015",
        "2024",
        "Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        (
            "Axel Sauer",
            "Frederic Boesel",
            "Tim Dockhorn",
            "Andreas Blattmann",
            "Patrick Esser",
            "Robin Rombach",
        ),
    ),
    "lcm": (
        "2310.04378",
        "2023",
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        ("Simian Luo", "Yiqin Tan", "Longbo Huang", "Jian Li", "Hang Zhao"),
    ),
    "lcm-lora": (
        "2311.05556",
        "2023",
        "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module",
        (
            *("Simian Luo", "Yiqin Tan", "Suraj Patil", "Daniel Gu", "Patrick von Platen"),
            *("Apolinário Passos", "Longbo Huang", "Jian Li", "Hang Zhao"),
        ),
    ),
    "dmd": (
        "2311.18828",
        "2023",
        "One-step Diffusion with Distribution Matching Distillation",
        (
            *("Tianwei Yin", "Michaël Gharbi", "Richard Zhang", "Eli Shechtman", "Frédo Durand"),
            *("William T. Freeman", "Taesung Park"),
        ),
    ),
    "dmd2": (
        "2405.14867",
        "2024",
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        (
            *("Tianwei Yin", "Michaël Gharbi", "Taesung Park", "Richard Zhang", "Eli Shechtman"),
            *("Frédo Durand", "William T. Freeman"),
        ),
    ),
    "phased-dmd": (
        "2510.27684",
        "2025",
        "Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        (
            *("Xiangyu Fan", "Zesong Qiu", "Zhuguanyu Wu", "Fanzhou Wang", "Zhiqian Lin", "Tianxiang Ren"),
            *("Dahua Lin", "Ruihao Gong", "Lei Yang"),
        ),
    ),
    "disback": (
        "2408.15991",
        "2024",
        "Distribution Backtracking Builds A Faster Convergence Trajectory for Diffusion Distillation",
        (
            *("Shengyuan Zhang", "Ling Yang", "Zejian Li", "An Zhao", "Chenye Meng", "Changyuan Yang"),
            *("Guang Yang", "Zhiyuan Yang", "Lingyun Sun"),
        ),
    ),
    "msd": (
        "2410.23274",
        "2024",
        "Multi-student Diffusion Distillation for Better One-step Generators",
        ("Yanke Song", "Jonathan Lorraine", "Weili Nie", "Karsten Kreis", "James Lucas"),
    ),
    "progressive": (
        "2202.00512",
        "2022",
        "Progressive Distillation for Fast Sampling of Diffusion Models",
        ("Tim Salimans", "Jonathan Ho"),
    ),
    "sid": (
        "2404.04057",
        "2024",
        "Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step "
        "Generation",
        ("Mingyuan Zhou", "Huangjie Zheng", "Zhendong Wang", "Mingzhang Yin", "Hai Huang"),
    ),
    "sid-lsg": (
        "2406.01561",
        "2024",
        "Guided Score identity Distillation for Data-Free One-Step Text-to-Image Generation",
        ("Mingyuan Zhou", "Zhendong Wang", "Huangjie Zheng", "Hai Huang"),
    ),
    "sid-few": (
        "2505.12674",
        "2025",
        "Few-Step Diffusion via Score identity Distillation",
        ("Mingyuan Zhou", "Yi Gu", "Zhendong Wang"),
    ),
    "sim": (
        "2410.16794",
        "2024",
        "One-Step Diffusion Distillation through Score Implicit Matching",
        ("Weijian Luo", "Zemin Huang", "Zhengyang Geng", "J. Zico Kolter", "Guo-jun Qi"),
    ),
    "swiftbrush": (
        "2312.05239",
        "2023",
        "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        ("Thuan Hoang Nguyen", "Anh Tran"),
    ),
    "tdm": (
        "2503.06674",
        "2025",
        "Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
        ("Yihong Luo", "Tianyang Hu", "Jiacheng Sun", "Yujun Cai", "Jing Tang"),
    ),
    "uni-instruct": (
        "2505.20755",
        "2025",
        "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
        ("Yifei Wang", "Weimin Bai", "Colin Zhang", "Debing Zhang", "Weijian Luo", "He Sun"),
    ),
}
"""arXiv number, year, title and authors."""

BEHIND: dict[str, tuple[str, ...]] = {
    "disback": ("disback", "dmd2", "dmd"),
    "dmd": ("dmd",),
    "dmd2": ("dmd", "dmd2"),
    "lcm": ("cm", "lcm"),
    "phased_dmd": ("phased-dmd", "dmd"),
    "pretrain": (),
    "sid": ("sid", "sid-lsg"),
    "sid_fewstep": ("sid-few", "sid", "sid-lsg"),
    "sim": ("sim",),
    "swiftbrush": ("swiftbrush",),
    "tdm": ("tdm",),
    "tsm": ("msd",),
    "uni_instruct": ("uni-instruct",),
}
"""Papers of each method, the first first."""


def papers(method: str, student: str, parts: int | None = 1) -> tuple[str, ...]:
    """Keys of `PAPERS` behind a method, as LoRA or full, with one student or several."""
    if parts and parts > 1:
        return ("msd", *papers(method, student))
    return (*BEHIND[method], "lcm-lora") if method == "lcm" and student == "lora" else BEHIND[method]


def of_parts(record: dict[str, Any]) -> Iterator[str]:
    """Keys of `PAPERS` behind what a config adds to its method."""
    if record.get("student_init") or record.get("student_config"):
        yield "msd"
    if record.get("regression_weight"):
        yield "progressive" if record.get("policy") == "trajectory" else "dmd"
    if record.get("gan_weight") and record.get("discriminator") == "heads":
        yield "dmd2"
        if record.get("discriminator_features") == "teacher":
            yield "ladd"


def bibtex(key: str) -> str:
    """One entry."""
    number, year, title, authors = PAPERS[key]
    surname = authors[0].split()[-1].lower()
    fields = {
        "title": f"{{{title}}}",
        "author": " and ".join(authors),
        "year": year,
        "eprint": number,
        "archivePrefix": "arXiv",
        "url": f"https://arxiv.org/abs/{number}",
    }
    lines = [f"  {name:<13} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@misc{{{surname}{year}{key.replace('-', '')},", *lines, "}"])


def cite(source: str) -> str:
    """The papers of what ran in a run's folder, or of the method alone in a student's.

    Raises:
        ConfigError: where there is neither.
    """
    folder = Path(source)
    for name, kind in (("config.yaml", "student"), ("fewstep.json", "kind"), ("student/fewstep.json", "kind")):
        try:
            text = (folder / name).read_text(encoding="utf-8")
            record = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
            keys = dict.fromkeys([*papers(record["method"], record[kind], record.get("parts")), *of_parts(record)])
        except OSError:
            continue
        except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"{folder / name}: not a run's record ({type(error).__name__})") from error
        if not keys:
            return f"% {record['method']} is ordinary training of a diffusion model: no paper of distillation to cite"
        return "\n\n".join(bibtex(key) for key in keys)
    raise ConfigError(f"{source}: neither a run nor a student's folder; a run has config.yaml, a student fewstep.json")
