"""Read by verl while it is imported, in spawned processes too."""

import os

os.environ["VERL_USE_EXTERNAL_MODULES"] = "integrations_verl.cpu_platform,paec_kernels.integrations.verl"
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engine that is made for it, on whatever the platform's device is
