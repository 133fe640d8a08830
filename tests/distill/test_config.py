"""What a config refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fewstep.distill.config import CONFIGS, METHODS, ConfigError, LCMConfig, TrainConfig, find, load_config
from fewstep.distill.methods import DISTILLERS

SHIPPED = sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.rglob("*.yaml"))
KNOWN = ", ".join(sorted(METHODS))
GOOD = {"method": "lcm", "teacher": "folder", "train_data": "images"}


def mistakes(values: object, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(values, overrides)  # type: ignore[arg-type]
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lerning_rate": 1e-4}, "config: lerning_rate: unknown key; did you mean learning_rate?"),
        ({"xyzzy": 1}, "config: xyzzy: unknown key"),
        ({"method": "dmd3"}, f"config: method: 'dmd3' is unknown; did you mean dmd? known: {KNOWN}"),
        ({"method": None}, f"config: method: missing; known: {KNOWN}"),
        ({"method": ["lcm"]}, f"config: method: ['lcm'] is unknown; did you mean lcm? known: {KNOWN}"),
        ({"student": "half"}, "config: student: Input should be 'lora' or 'full'; got 'half'"),
        (
            {"min_bucket_reso": 128, "max_bucket_reso": 64},
            "config: max_bucket_reso: must be at least min_bucket_reso 128; got 64",
        ),
        ({"rank": 0}, "config: rank: Input should be greater than or equal to 1; got 0"),
        ({"learning_rate": float("nan")}, "config: learning_rate: Input should be a finite number; got nan"),
        ({"name": "a/b"}, "config: name: must be one folder name; got 'a/b'"),
        ({"steps": [4, 0]}, "config: steps.1: Input should be greater than 0; got 0"),
        ({"guidance_scale_max": 7.5}, "config: guidance_scale_max: must exceed guidance_scale 7.5; got 7.5"),
        # the default of one key may contradict what another is set to
        ({"steps": [1, 9]}, "config: steps: method lcm takes 1 to 8; got [1, 9]"),
        ({"num_ode_steps": 4}, "config: steps: must be at most num_ode_steps 4; got [1, 2, 4, 8]"),
        ({"method": "dmd2", "min_level": 0.99}, "config: max_level: must exceed min_level 0.99; got 0.98"),
        (
            {"lr_scheduler": "piecewise_constant"},
            "config: lr_step_rules: goes with lr_scheduler: piecewise_constant, and that with it; got None",
        ),
        (
            {"lr_step_rules": "1:4,0.5"},
            "config: lr_step_rules: goes with lr_scheduler: piecewise_constant, and that with it; got '1:4,0.5'",
        ),
        (
            {"lr_scheduler": "steps", "lr_step_rules": "1:4,0.5"},
            "config: lr_scheduler: Input should be 'constant', 'linear', 'cosine' or 'piecewise_constant'; got 'steps'",
        ),
        *(
            (
                {"lr_scheduler": "piecewise_constant", "lr_step_rules": rules},
                "config: lr_step_rules: must be multiples above 0 and growing iterations where they end, like "
                f"1:8000,0.5:9000,0.1; got {rules!r}",
            )
            for rules in ("1:4", "1:4,0.5:4,0.1", "1:4,0", "1:4,inf", "1:4.5,0.1", "", "a", "1:0,0.5")
        ),
        (
            {"method": "sim", "fake_guidance_scale": 2.0},
            "config: fake_guidance_scale 2 must be fake_train_guidance_scale 1 for divergence sim, whose F - x0 needs the "
            "student's own denoiser; sid takes two",
        ),
        (
            {"validation_prompts": ["a", "b \ud83d"]},
            "config: validation_prompts.1: is no valid Unicode, at character 3; got 'b \\ud83d'",
        ),
        (
            {"max_train_steps": "many"},
            "config: max_train_steps: Input should be a valid integer, unable to parse string as an integer; got 'many'",
        ),
    ],
)
def test_a_mistake_is_one_line(changes: dict, line: str):
    assert mistakes(GOOD | changes) == [line]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_takes_its_own_step_counts(method: str):
    """The family 1 to 4, of phases 2 at least, lcm 1 to 8, and what samples as its teacher does any; all others are refused."""
    first, last = {"phased_dmd": (2, 4), "lcm": (1, 8), "pretrain": (1, 1000), "tsm": (1, 1000)}.get(method, (1, 4))
    key = "step_counts" if last == 1000 else "steps"
    alone = {"regression_weight": 0.0} if method == "dmd" else {}  # which is of one step
    for count in (first, last):
        load_config({"method": method, "teacher": "x", key: [count], **alone})
    for counts in ([last + 1], [first, last + 1], *([[1]] if first > 1 else [])):
        said = f"config: {key}: method {method} takes {first} to {last}; got {counts}"
        assert mistakes({"method": method, "teacher": "x", key: counts}) == [said]


def test_a_missing_key_says_what_it_is():
    assert mistakes({"method": "lcm"}) == [
        "config: teacher: missing; pipeline folder, embedded:NAME, hub id or FILE.safetensors@CONFIG"
    ]


def test_all_mistakes_at_once(tmp_path: Path):
    """Unknown, missing, of a wrong type and contradictory, in one answer; each line names file and key."""
    path = tmp_path / "bad.yaml"
    path.write_text("method: lcm\nrank: big\nstudnet: lora\nguidance_scale_max: 2\nsteps: [60]\n")
    lines = mistakes(path)
    assert {line.removeprefix(f"{path}: ").split(":")[0] for line in lines} == {
        *("teacher", "rank", "studnet", "guidance_scale_max", "steps")
    }
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_overrides_are_yaml_values(tmp_path: Path):
    path = tmp_path / "lcm.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    config = load_config(
        path, ["learning_rate=1e-4", "steps=[1, 2]", "lora_alpha=null", "caption_column=a=b", "max_train_steps=7"]
    )
    assert isinstance(config, LCMConfig)
    assert (config.learning_rate, config.steps, config.max_train_steps) == (1e-4, [1, 2], 7)
    assert (config.lora_alpha, config.caption_column) == (None, "a=b")
    assert config.name == "lcm"  # of the file
    assert mistakes(path, "steps") == ["steps: an override is key=value"]
    assert mistakes(path, "=3") == ["=3: an override is key=value"]
    assert mistakes(path, "steps=[1") == ["steps=[1: the value is not YAML; quote a text, as in steps='\"2024\"'"]
    assert mistakes(path, "name=2024-13-01") == [
        "name=2024-13-01: the value is not YAML; quote a text, as in name='\"2024\"'"
    ]


def test_no_precision_needs_no_quotes():
    """YAML reads `no` as False."""
    assert load_config("quickstart", ["mixed_precision=no"]).mixed_precision == "no"


def test_a_part_of_a_value_that_is_missing_has_its_line():
    lines = mistakes(GOOD | {"aspect_ratio_buckets": [[64]]})
    assert lines[-1].endswith(".0.1: missing; it is required")


def test_a_home_folder_is_the_users(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config("quickstart", ["output_dir=~/runs", "name=a"])
    assert config.run_dir == Path("/home/someone/runs/a")


def test_a_file_that_is_no_config(tmp_path: Path):
    listed, broken, binary = (tmp_path / n for n in ("list.yaml", "broken.yaml", "binary.yaml"))
    listed.write_text("- a\n- b\n")
    broken.write_text("a: [1\nb: 2\n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert mistakes(listed) == [f"{listed}: must be a mapping of keys to values"]
    assert mistakes(broken)[0].startswith(f"{broken}: not YAML: ")
    broken.write_text("method: lcm\nrank: 4\nsteps: [1]\nrank: 8\n")
    assert mistakes(broken) == [f"{broken}: not YAML: rank is there twice"]
    assert mistakes(binary)[0].startswith(f"{binary}: not YAML: ")
    [line] = mistakes("quickstrat")
    assert line.endswith("no shipped config of that name; did you mean quickstart?")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_valid(name: str):
    """By name from anywhere, and again as the resolved config that a run writes."""
    config = load_config(name)
    assert find(name) == CONFIGS / f"{name}.yaml"
    assert config.name == name.replace("/", "-")  # lcm/sd15 and dmd2/sd15 do not share a run folder
    assert load_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_every_method_has_a_config_and_a_distiller():
    assert METHODS.keys() == DISTILLERS.keys()
    for name, model in METHODS.items():
        assert issubclass(model, TrainConfig)
        assert model.model_fields["method"].annotation.__args__ == (name,)  # type: ignore[union-attr]


def test_checking_a_config_imports_no_torch(fresh_python):
    """A refused config is answered at once."""
    code = """
        import sys
        from fewstep.distill.config import load_config
        load_config("quickstart", ["rank=4"])
        print(sorted(sys.modules.keys() & {"torch", "numpy", "diffusers", "transformers", "accelerate", "peft"}))
    """
    assert fresh_python(code) == "[]"
