"""The command ``paec``: train, eval, compare, inspect, export."""

import argparse
import copy
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.distributed as dist

from paec_kernels.extras import extra

try:
    with extra("train"):
        import tyro

    from paec_kernels.train import commands
    from paec_kernels.train.algorithms import ALGORITHMS
    from paec_kernels.train.config import CompareConfig, EvalConfig, ExportConfig, TrainConfig
    from paec_kernels.train.inspect import InspectConfig
    from paec_kernels.train.presets import PRESETS
except ModuleNotFoundError as error:
    sys.exit(f"paec: {error}")


def main(args: Sequence[str] | None = None) -> None:
    """Run ``paec`` with these arguments, by default the process' own.

    Exits with 2 and one line for a wrong value, a file that cannot be read or written, or a gradient that is not
    finite, and with 130 after an interrupt. Under torchrun, every process calls it.
    """
    args = list(sys.argv[1:] if args is None else args)
    defaults = _train_defaults(args)
    subcommands = {
        "train": _subcommand(commands.train, defaults),
        "eval": _subcommand(commands.evaluate, EvalConfig()),
        "compare": _subcommand(commands.compare, CompareConfig(train=defaults)),
        "inspect": _subcommand(commands.inspect, InspectConfig()),
        "export": _subcommand(commands.export, ExportConfig()),
    }
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:  # torchrun's
        dist.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        status = tyro.extras.subcommand_cli_from_dict(subcommands, prog="paec", args=args)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"paec: {error}", file=sys.stderr)
        status = 2
    finally:
        if distributed:
            dist.destroy_process_group()
    sys.exit(status)


def _subcommand(command: Callable[[Any], int], default: Any) -> Callable[..., int]:
    """Return the command as tyro reads it: with the options that its config has, and what the config's class says."""
    whole = tyro.conf.arg(name="")  # options without the prefix of the parameter's name

    def run(config: Annotated[type(default), whole] = default) -> int:  # type: ignore[valid-type]
        return command(config)

    run.__doc__ = type(default).__doc__
    return run


def _train_defaults(args: list[str]) -> TrainConfig:
    """Read two options ahead of the others, since they decide which others there are, and their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--preset", "--train.preset"):
        parser.add_argument(name, dest="preset", default="tiny")
    for name in ("--algo", "--train.algo"):
        parser.add_argument(name, dest="algo")
    ahead, _ = parser.parse_known_args(args)
    if ahead.preset not in PRESETS:
        return TrainConfig()  # the other parser names the choices
    preset = PRESETS[ahead.preset]
    if ahead.algo not in ALGORITHMS or ahead.algo == preset.algo:
        return preset
    # Unchecked: the oracle fits none of these defaults, and only together with --tasks, which are read after them.
    defaults = copy.copy(preset)
    for name, value in {"algo": ahead.algo, "method": ALGORITHMS[ahead.algo]()}.items():
        object.__setattr__(defaults, name, value)
    return defaults


if __name__ == "__main__":
    main()
