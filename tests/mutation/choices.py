"""Which modules are mutated, and which tests have to notice: files of tests/, the nearest ones to the module."""

from fnmatch import fnmatch
from pathlib import Path

ADAPTERS = ("test_adapters", "test_adapter_files", "test_adapter_merging")
DISTANCES = ("test_imitation_errors", "test_imitation", "test_imitation_plans", "test_weight_distance_plans")
HOSTILE = ("test_hostile_calls",)
ERRORS = ("test_lowrank_linear_errors", "test_batched_lowrank_linear_errors", "test_gated_query_errors")
FILES = (
    "test_adapter_files",
    "test_adapter_hostile_files",
    "test_moil_state",
    "test_lora_files",
    "test_adapter_hostile_places",
)
OPERATIONS = ("test_gated_query", "test_reconstruct", "test_batched_lowrank_linear", "test_lowrank_linear")
OPERATION = ("test_backend", "test_*", "test_transforms")
CUDA = tuple(f"{operation}_cuda" for operation in (*OPERATIONS, "test_lowrank_projections", "test_weight_distance"))
LAYERS = ("test_layers", "test_aurora", "test_lowrank_linear_compile")
LAUNCHES = ("static/test_replay", "static/test_replay_calls")

# {pattern of modules: their tests}; * is the name of the operation. The first that fits counts.
CHOICES = {
    "peft_kernels/ops/lowrank_linear.py": (*ERRORS[:1], *OPERATION, "test_*_dropout", *LAYERS),
    "peft_kernels/ops/batched_lowrank_linear.py": (*ERRORS[1:2], *OPERATION, "test_integrations_peft_lora_mixed"),
    "peft_kernels/ops/lowrank_projections.py": (*HOSTILE, *OPERATION, "test_groups", "test_adapted_mlp"),
    "peft_kernels/ops/gated_query.py": (*ERRORS[2:], *OPERATION, "test_*_compile", "test_gates"),
    "peft_kernels/ops/reconstruct.py": (*OPERATION, "test_adapter_merging", "test_layers"),
    "peft_kernels/ops/weight_distance.py": (*OPERATION, "test_*_plans"),
    "peft_kernels/operator.py": ("test_gated_query_compile", "test_lowrank_linear_compile", *OPERATIONS),
    "peft_kernels/transforms.py": ("test_transforms",),
    "peft_kernels/backend.py": (
        *HOSTILE,
        "test_backend",
        "test_environment",
        "test_moil_use",
        "test_lowrank_linear_compile",
    ),
    "peft_kernels/checks.py": (
        *HOSTILE,
        *ERRORS,
        *DISTANCES[:1],
        "test_lowrank_linear",
        *OPERATIONS[:2],
        "test_layers",
    ),
    "peft_kernels/remembered.py": ("test_remembered", *ERRORS, "static/test_replay_calls"),
    "peft_kernels/records.py": ("test_backend", *OPERATIONS, *LAYERS, "test_imitation", "test_lowrank_linear_cuda"),
    "peft_kernels/torch_kernels/support.py": ("test_backend",),
    "peft_kernels/torch_kernels/lowrank_linear.py": ("test_*", "test_*_dropout", "test_transforms", *LAYERS),
    "peft_kernels/torch_kernels/weight_distance.py": ("test_*", "test_transforms", *DISTANCES),
    "peft_kernels/torch_kernels/lowrank_projections.py": ("test_*", "test_transforms", "test_groups"),
    "peft_kernels/torch_kernels/*.py": ("test_*", "test_transforms", "test_layers", "test_gates"),
    "peft_kernels/cuda_kernels/support.py": ("test_backend", *CUDA),
    "peft_kernels/cuda_kernels/lowrank_linear.py": ("test_*_cuda",),
    "peft_kernels/cuda_kernels/common.py": CUDA,
    "peft_kernels/cuda_kernels/__init__.py": ("test_backend", "test_environment", "test_reconstruct_cuda"),
    "peft_kernels/cuda_kernels/*.py": ("test_*_cuda",),
    "peft_kernels/adapters/aurora.py": ("test_aurora", "test_aurora_sharing", *ADAPTERS),
    "peft_kernels/adapters/called.py": ("test_adapter_calls",),
    "peft_kernels/adapters/baselines.py": ("test_baselines", *ADAPTERS),
    "peft_kernels/adapters/checkpoint.py": (*FILES, *ADAPTERS),
    "peft_kernels/adapters/config.py": (
        "test_adapter_config_errors",
        "test_targets",
        "test_lora",
        "test_aurora",
        "test_moil_use",
        *ADAPTERS,
        *FILES,
    ),
    "peft_kernels/adapters/gates.py": ("test_gates", *ADAPTERS),
    "peft_kernels/adapters/groups.py": ("test_groups", *ADAPTERS),
    "peft_kernels/adapters/heads.py": ("test_presets", "test_towers", "test_moil_models", *ADAPTERS, *FILES),
    "peft_kernels/adapters/mlps.py": ("test_recomputing_mlp", "test_recomputed"),
    "peft_kernels/adapters/lora.py": ("test_lora", "test_lora_files", *ADAPTERS),
    "peft_kernels/adapters/lora_files.py": (*FILES[3:], "test_lora", *FILES),
    "peft_kernels/adapters/model_checks.py": ("test_adapter_weights", "test_adapter_hooks", "test_integrations_ddp"),
    "peft_kernels/adapters/moil.py": ("test_moil", "test_moil_use", "test_moil_state", "test_moil_models", *ADAPTERS),
    "peft_kernels/adapters/state_files.py": (*FILES, *ADAPTERS),
    "peft_kernels/adapters/targets.py": ("test_targets", "test_presets", "test_towers", *ADAPTERS),
    "peft_kernels/adapters/writing.py": ("test_adapter_crashes", *FILES[:1]),
    "peft_kernels/adapters/base.py": (
        "test_adapter_weights",
        "test_adapter_config_errors",
        *ADAPTERS,
        "test_lora",
        "test_aurora",
        *FILES[1:3],
    ),
    "peft_kernels/imitation/*.py": (*DISTANCES, "test_moil"),
    "triton_kernels/replay.py": LAUNCHES,
    "triton_kernels/support.py": ("test_backend", "test_environment"),
}


def modules(root: Path) -> list[str]:
    found = (path for pattern in CHOICES for path in root.glob(pattern))
    return sorted({str(path.relative_to(root)) for path in found if path.read_text(encoding="utf-8").count("\n") > 1})


def tests_of(module: str) -> tuple[str, ...]:
    tests = next(tests for pattern, tests in CHOICES.items() if fnmatch(module, pattern))
    return tuple(dict.fromkeys(f"tests/{test.replace('*', Path(module).stem)}.py" for test in tests))


def left_out(module: str) -> str:
    """Tests, as pytest's -k names them: interpreted kernels are slow, and other modules' launchers need none."""
    return "" if module.startswith("triton_kernels/") else "not triton"
