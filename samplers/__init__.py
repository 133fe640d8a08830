"""Run a diffusion model: noise process, denoisers over diffusers pipelines, few-step samplers, student artifacts."""

from fewstep.samplers.compat import declare_torchvision_operators

declare_torchvision_operators()  # before anything imports diffusers
