"""FastGen's DMD2 model over a network of ours, for `fastgen.py`: nothing of it is copied, its own code runs."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.objectives.adversarial import Heads
from fewstep.samplers.features import captured

MISSING = ("attrs", "boto3", "botocore", "einops", "ftfy", "imageio", "loguru", "omegaconf", "wandb")
"""What modules of FastGen import on the way to the DMD2 model, which then needs none of it, but two classes below."""


class _Anything(type):
    """A class of which every attribute is there and every call is answered."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing


class Nothing(metaclass=_Anything):
    """Takes every call and says nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return self


class DictConfig(dict):
    """Stands in for omegaconf's: a mapping, which is all that FastGen's `instantiate` asks for."""

    def __init__(self, content: dict[str, Any] | None = None, flags: Any = None):
        super().__init__(content or {})


def stand_ins() -> None:
    """Modules for packages that are not installed."""
    for name in MISSING:
        if importlib.util.find_spec(name) is not None:
            continue
        module: Any = ModuleType(name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: _Anything.__getattr__(Nothing, attribute)
        sys.modules[name] = module
    for name in ("botocore.exceptions", "imageio.v3"):
        top = sys.modules.get(name.split(".")[0])
        if getattr(top, "__path__", None) == []:
            sys.modules[name] = top  # type: ignore[assignment]
    if isinstance(sys.modules.get("omegaconf"), ModuleType) and sys.modules["omegaconf"].__path__ == []:
        sys.modules["omegaconf"].DictConfig = DictConfig  # type: ignore[attr-defined]
    if isinstance(sys.modules.get("attrs"), ModuleType) and sys.modules["attrs"].__path__ == []:
        sys.modules["attrs"].asdict = lambda value: dict(vars(value))  # type: ignore[attr-defined]


def fastgen_side(
    a: argparse.Namespace, teacher: Any, latents: Tensor, prompts: Sequence[str]
) -> tuple[Callable[[int], Any], list[nn.Module]]:
    """FastGen's iteration of DMD2, as its trainer runs it, and the networks of its three roles.

    Args:
        a: settings of `fastgen.py`.
        teacher: a denoiser whose UNet predicts v.
        latents: what stands for real data, one for each prompt.
        prompts: of the batches.
    """
    stand_ins()
    sys.path.insert(0, str(a.fastgen))
    methods: Any = ModuleType("fastgen.methods")  # without its __init__, which imports every method
    methods.__path__ = [f"{a.fastgen}/fastgen/methods"]
    sys.modules["fastgen.methods"] = methods
    methods.FastGenModel = importlib.import_module("fastgen.methods.model").FastGenModel
    DMD2Model = importlib.import_module("fastgen.methods.distribution_matching.dmd2").DMD2Model
    FastGenNetwork = importlib.import_module("fastgen.networks.network").FastGenNetwork
    get_optimizer = importlib.import_module("fastgen.configs.opt").get_optimizer
    schedule = importlib.import_module("fastgen.utils.lr_scheduler").LambdaLinearScheduler

    alphas = teacher.pipeline.scheduler.alphas_cumprod
    blocks = teacher.feature_blocks

    class Same(FastGenNetwork):
        """A copy of the teacher's UNet, called as FastGen calls networks."""

        def __init__(self):
            super().__init__("v", "alphas", alphas_cumprod=alphas)
            self.unet = copy.deepcopy(teacher.network).float().requires_grad_(True)

        def forward(
            self,
            x_t: Tensor,
            t: Tensor,
            condition: Any = None,
            r: Any = None,
            return_features_early: bool = False,
            feature_indices: Any = None,
            return_logvar: bool = False,
            fwd_pred_type: str | None = None,
            **rest: Any,
        ) -> Any:
            time = self.noise_scheduler.rescale_t(t)
            wanted = captured(self.unet, blocks, stop=return_features_early) if feature_indices else nullcontext({})
            with wanted as features:
                out = self.unet(x_t, time, encoder_hidden_states=condition, return_dict=False)[0]
                out = self.noise_scheduler.convert_model_output(x_t, out, t, "v", fwd_pred_type or "v")
            if return_features_early:
                return [features[name] for name in blocks]
            return [out, [features[name] for name in blocks]] if feature_indices else out

    class Discriminator(nn.Module):
        """The heads that fewstep puts on the same blocks."""

        def __init__(self):
            super().__init__()
            self.feature_indices = set(range(len(blocks)))
            x = torch.zeros(1, *teacher.latent_shape(), device=teacher.device)
            with torch.no_grad():
                condition = teacher.encode([""]).to(teacher.device)
                self.heads = Heads(teacher.features(x, torch.ones(1), condition))

        def forward(self, features: list[Tensor]) -> Tensor:
            return self.heads(features)

    amp = None if a.precision == "no" else "bfloat16"
    optimizer = {"_target_": get_optimizer, "optim_type": "adamw", "lr": 1e-4, "weight_decay": 0.01}
    still = {"warm_up_steps": [0], "cycle_lengths": [10**10], "f_start": [1.0], "f_max": [1.0], "f_min": [1.0]}
    rate = {"_target_": schedule, **still}
    config = SimpleNamespace(
        **{"device": a.device, "precision": "float32", "precision_amp": amp, "precision_amp_infer": None},
        **{"precision_amp_enc": None, "precision_fsdp": None, "input_shape": list(teacher.latent_shape())},
        **{"net": {"_target_": Same}, "teacher": None, "pretrained_model_path": "", "pretrained_student_net_path": ""},
        **{"load_student_weights": True, "use_ema": False, "enable_preprocessors": False, "fsdp_meta_init": False},
        **{"add_teacher_to_fsdp_dict": True, "grad_scaler_enabled": False, "grad_scaler_init_scale": 65536.0},
        **{"grad_scaler_growth_interval": 2000, "guidance_scale": None if a.guidance == 1 else a.guidance},
        **{
            "skip_layers": None,
            "student_sample_steps": a.steps,
            "student_sample_type": "sde",
            "student_update_freq": 2,
        },
        **{"gan_loss_weight_gen": a.gan, "gan_use_same_t_noise": False, "gan_r1_reg_weight": 0.0},
        **{"fake_score_pred_type": None, "discriminator": {"_target_": Discriminator}},
        **{f"{name}_optimizer": optimizer for name in ("net", "fake_score", "discriminator")},
        **{f"{name}_scheduler": rate for name in ("net", "fake_score", "discriminator")},
        sample_t_cfg=SimpleNamespace(time_dist_type="uniform", min_t=0.02, max_t=0.98, t_list=None),
    )
    model = DMD2Model(config)
    model.on_train_begin()
    model.init_optimizers()
    with torch.no_grad():
        encoded = teacher.encode(list(prompts), "")
    key = "encoder_hidden_states"
    hidden, empty = encoded.tensors[key], encoded.negative[key]

    def step(i: int) -> None:
        rows = torch.randint(len(latents), (a.batch,))
        data = {
            "real": latents[rows],
            "condition": hidden[rows],
            "neg_condition": empty.expand(a.batch, *hidden.shape[1:]),
        }
        data = {k: v.to(a.device) for k, v in data.items()}
        with model.autocast():
            losses, _ = model.single_train_step(data, i)
        model.grad_scaler.scale(losses["total_loss"]).backward()
        for optimizer in model.get_optimizers(i):
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        model.optimizers_schedulers_step(i)
        model.optimizers_zero_grad(i)

    return step, [network.unet for network in (model.net, model.teacher, model.fake_score)]
