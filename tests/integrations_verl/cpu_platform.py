"""A CPU platform for verl, which has none. verl loads it as it loads any platform from outside; all else is verl's."""

from types import SimpleNamespace

from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class PlatformCPU(PlatformCUDA):
    device_name = "cpu"
    device_module = SimpleNamespace(
        **{f"{peak}memory_{kind}": lambda: 0 for peak in ("", "max_") for kind in ("allocated", "reserved")},
        mem_get_info=lambda: (0, 0),
        get_device_name=lambda: "CPU",
        is_available=lambda: False,
    )

    def is_available(self) -> bool:
        return False  # no accelerator, whose random state a checkpoint would hold

    def current_device(self) -> str:
        return "cpu"

    def communication_backend_name(self) -> str:
        return "gloo"


set_platform(PlatformCPU())
