"""How the plug-in gets into verl's processes, each time a fresh one, and that a failure to get there is not silent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed: its transformers is an older one, see make test-verl")

MODULE = "paec_kernels.integrations.verl"
NONE = {"VERL_USE_EXTERNAL_MODULES": "", "VERL_USE_EXTERNAL_PLUGINS": "none"}
WORKER = "from verl.workers.engine_workers import ActorRolloutRefWorker as a; print(a.actor_worker_cls.__name__)"
TARGET = f"actor_rollout_ref.actor.policy_loss._target_={MODULE}.PAECPolicyLossConfig"
KEYS = ["+actor_rollout_ref.actor.policy_loss.paec.beta=0.01", "+actor_rollout_ref.actor.policy_loss.paec.rho=0.9"]
# verl's own configuration with overrides, and what its worker makes of the actor's part
CONFIGURE = """
import sys, verl, hydra, pathlib
from verl.utils.config import omega_conf_to_dataclass
folder = str(pathlib.Path(verl.__file__).parent / "trainer" / "config")
required = ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.n=8"]
with hydra.initialize_config_dir(folder, version_base=None):
    config = hydra.compose("ppo_trainer", required + sys.argv[1:])
actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
print(type(actor.policy_loss).__name__, actor.policy_loss.get("paec"), actor.policy_loss.loss_mode)
"""


@pytest.fixture
def run(tmp_path: Path):
    """Runs code in an empty folder, from which Python imports before it looks at what is installed."""

    def run(code: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
        return subprocess.run(command, env=os.environ | env, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_the_environment_variable_loads_it(run) -> None:
    done = run("import verl\n" + WORKER, env=NONE | {"VERL_USE_EXTERNAL_MODULES": MODULE})
    assert done.stdout.split()[-1:] == ["PAECTrainingWorker"], done.stderr


def test_the_entry_point_loads_it(run) -> None:
    done = run("import verl\n" + WORKER, env=NONE | {"VERL_USE_EXTERNAL_PLUGINS": "auto"})
    assert done.stdout.split()[-1:] == ["PAECTrainingWorker"], done.stderr


def test_the_configuration_loads_it(run) -> None:
    code = f"import verl\n{WORKER}\n{CONFIGURE}\n{WORKER}"
    done = run(code, TARGET, *KEYS, "actor_rollout_ref.actor.policy_loss.loss_mode=gspo", env=NONE)
    expected = ["TrainingWorker", "PAECPolicyLossConfig {'beta': 0.01, 'rho': 0.9} gspo", "PAECTrainingWorker"]
    assert done.stdout.splitlines()[-3:] == expected, done.stderr


@pytest.mark.parametrize("route", ["environment variable", "entry point"])
def test_a_module_that_does_not_load_is_no_secret(run, tmp_path: Path, route: str) -> None:
    (tmp_path / "paec_kernels").mkdir()
    (tmp_path / "paec_kernels" / "__init__.py").write_text("raise ImportError('a broken installation')")
    env = {"VERL_USE_EXTERNAL_MODULES": MODULE} if route == "environment variable" else {}
    env |= {"VERL_USE_EXTERNAL_PLUGINS": "auto"}
    done = run("import verl; print('imported')\n" + CONFIGURE, TARGET, env=NONE | env)
    # verl goes on when an entry point fails; the configuration then does not.
    assert ("imported" in done.stdout) == (route == "entry point")
    assert done.returncode != 0
    assert "a broken installation" in done.stderr


def test_keys_without_the_target_are_refused(run) -> None:
    done = run(CONFIGURE, *KEYS, env=NONE)
    assert done.returncode != 0
    assert "unexpected keyword argument 'paec'" in done.stderr
