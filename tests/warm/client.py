"""Stands where an interpreter is wanted: hands its command to the warm server and ends as that command ends.

Little of the standard library is imported, and nothing else. A command whose environment differs from the server's in what may
be read while modules are imported gets an interpreter of its own.
"""

import json
import os
import signal
import socket

PLACE = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "GROUP_",
    "ROLE_",
    "CROSS_",
    "NODE_RANK",
    "SLURM_",
    "OMPI_",
    "PMI",
)
"""What the names of variables begin with that tell a rank its place."""
LAUNCHERS = (
    "TORCHELASTIC_",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "ACCELERATE_",
    "FSDP_",
    "CUDA_VISIBLE_DEVICES",
    "NNODES",
    "DS_ENV_FILE",
    "PDSH_",
)
LOGIN = ("SHELL", "USER", "LOGNAME", "MAIL", "SSH_", "PYENV_")
SHELL = ("PATH", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "PYTHONPATH", "PYTHONUNBUFFERED")
OURS = ("TRACE_DIST_", "TEST_", "PYTEST_", "HF_DATASETS_CACHE")
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
QUIET = {
    "DS_LOG_LEVEL": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What a command sets before it imports anything, and the server has."""
SET_BY_IMPORTS = (
    *("PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR"),  # torch
    *("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"),  # scikit-learn
)
MAY_DIFFER = (*PLACE, *LAUNCHERS, *LOGIN, *SHELL, *OURS, *SECRETS, *QUIET, *SET_BY_IMPORTS)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """The part of an environment that modules may read while they are imported."""
    return {key: value for key, value in environment.items() if key != "_" and not key.startswith(MAY_DIFFER)}


def main(path: str, python: str, words: list[str]) -> None:
    environment = dict(os.environ)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        answers = server.makefile("rb")
        request = {"words": words, "environment": environment, "folder": os.getcwd()}
        data = json.dumps(request).encode()
        socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(data)
        pid = json.loads(answers.readline())["pid"]
        if pid is None:
            os.execve(python, [python, *words], environment)
        for number in FORWARDED:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = json.loads(answers.readline())["code"]
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
