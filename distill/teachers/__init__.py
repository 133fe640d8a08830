"""Scripts that make the embedded teacher and its judge: drawings, autoencoder, untrained pipeline, judge."""

import fewstep.samplers  # noqa: F401  its compat module must run before diffusers is imported
