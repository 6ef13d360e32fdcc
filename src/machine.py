"""Whether this machine can do what a command asks of it, seen before a run begins.

Every check raises a UserError that says what to do.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only

from src.errors import UserError, say
from src.model import int8
from src.model.classifier import TransferClassifier


def check_machine(trainer: Trainer, model: TransferClassifier, sync_batchnorm: bool, trains: bool) -> None:
    """Refuse what device, compiler or the number of processes do not allow.

    Args:
        trainer: With the user's settings.
        model: The network that is to run.
        sync_batchnorm: Whether statistics are shared by all processes.
        trains: Whether the command is a training.
    """
    environment = trainer._accelerator_connector.cluster_environment
    check_processes(environment, trainer.num_devices * trainer.num_nodes)
    device = trainer.strategy.root_device
    check_device(device, sync_batchnorm)
    if model.compiled:
        check_compiler(device)
    if model.cuda_graphs and trains:
        check_graphs(device)
    if model.frozen_precision == "int8":
        check_int8(device)


def check_device(device: torch.device, sync_batchnorm: bool) -> None:
    """Refuse what the device cannot do.

    Lightning takes Apple's GPUs on its own, and the augmentation needs float64, which they lack.

    Args:
        device: Where the network runs.
        sync_batchnorm: Whether statistics are shared by all processes, which torch does on GPUs only.
    """
    if device.type == "cpu" and sync_batchnorm:
        raise UserError("trainer.sync_batchnorm is for GPUs: leave it out, or give --trainer.accelerator gpu.")
    if device.type == "mps":
        raise UserError("Apple's GPUs are not supported: add --trainer.accelerator cpu.")


def check_processes(environment: ClusterEnvironment, wanted: int) -> None:
    """Refuse to train in another number of processes than torchrun or srun has started.

    Each of them would train alone, and all would write the same run.

    Args:
        environment: What Lightning takes for the one that starts processes.
        wanted: How many there are to be.
    """
    if isinstance(environment, TorchElasticEnvironment):
        started, by = int(os.environ["WORLD_SIZE"]), "torchrun"
    elif isinstance(environment, SLURMEnvironment) and "SLURM_STEP_NUM_TASKS" in os.environ:  # which srun sets
        started, by = int(os.environ["SLURM_STEP_NUM_TASKS"]), "srun"
    elif isinstance(environment, SLURMEnvironment) and wanted > 1:
        raise UserError(f"Slurm starts the {wanted} processes of a job by srun: put srun in front of python.")
    else:
        return
    if started != wanted:
        raise UserError(
            f"{by} has started {started} process(es), and trainer.devices times trainer.num_nodes is {wanted}: add "
            "--config configs/with/ddp.yaml, and on a CPU, or for several machines, --trainer.devices and "
            "--trainer.num_nodes as they were started (by srun each must see all GPUs of its machine)."
        )


def check_int8(device: torch.device) -> None:
    """Refuse frozen layers in eight bits where they could not be computed, fast and right.

    Args:
        device: Where the network runs.
    """
    if device.type != "cpu":
        raise UserError(f"model.frozen_precision int8 is for CPUs, and this run is on {device.type}: use bf16.")
    if not int8.supported():
        raise UserError(int8.UNSUPPORTED)


def say_if_emulated(trainer: Trainer) -> None:
    """Say that bfloat16 will be slow where the processor does not know it, and each operation converts its numbers.

    Args:
        trainer: With the user's settings.
    """
    knows = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    x86 = platform.machine() in ("x86_64", "AMD64")  # of other processors torch does not tell
    if trainer.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu" and x86 and not knows():
        rank_zero_only(say)(
            "trainer.precision bf16-mixed is several times as slow as single precision on this processor, which lacks "
            "avx512_bf16: give --trainer.precision 32-true"
        )


def check_graphs(device: torch.device) -> None:
    """Refuse to record CUDA graphs where there is no GPU.

    Args:
        device: Where the network runs.
    """
    if device.type != "cuda":
        raise UserError(
            f"model.cuda_graphs is for GPUs, and this run is on {device.type}: add --model.cuda_graphs false."
        )


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch.compile would not find the compiler it hands its code to.

    Args:
        device: Where the network runs: torch writes C++ for CPUs; for GPUs Triton needs a C compiler.
    """
    language, variable, usual = "C", "CC", ["gcc", "clang"]
    if device.type == "cpu":
        language, variable, usual = "C++", "CXX", ["g++"]
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(map(shutil.which, chosen or usual)):
        raise UserError(
            f"model.compile needs a {language} compiler, and {' or '.join(chosen or usual)} is not here: install one "
            f"(set {variable} if it has another name), or leave out model.compile."
        )
