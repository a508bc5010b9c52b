"""What all stages of a run share: where it lives, its model, questions, tools and policy.

Presets: `tiny` (the built-in offline world, from nothing, on a laptop) and `qwen2.5-7b` (the numbers
ET-Agent published, with an SGLang server).
"""

from ml_collections import ConfigDict

PRESETS = ("tiny", "qwen2.5-7b")


def choose(preset: str, **by_preset: dict) -> ConfigDict:
    """The settings of one preset; keyword names spell `qwen2.5-7b` as `qwen`."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not one of: {', '.join(PRESETS)}")
    return ConfigDict(by_preset["tiny" if preset == "tiny" else "qwen"])


def get_config(preset: str = "tiny") -> ConfigDict:
    config = choose(
        preset,
        tiny={
            "run": "runs/quickstart",
            "model": {  # the shape of the model that `base` trains from nothing
                "path": "",
                "hidden_size": 128, "intermediate_size": 384, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
                "head_dim": 32, "rope_theta": 10_000.0, "max_position": 512,
            },
            "questions": {"source": "world", "kind": "", "countries": 2000, "train": "", "validation": "", "test": ""},
            "system_prompt": "Answer with tools.",
            "tools": {
                "search": {"corpus": "", "top_n": 1, "max_chars": 1000},
                "python": {"timeout_seconds": 5.0, "memory_mib": 512, "workers": 2},
            },
            "policy": {"backend": "embedded", "slots": 128, "context": 256, "chunk": 16,
                       "url": "", "timeout": 120.0, "patience": 600.0, "colocated": False},
            "reviser": {"url": "", "model": "", "temperature": 0.0, "max_tokens": 512, "concurrency": 16},
            "rollout": {"calls_per_tool": 3, "calls": 4, "seconds": 60.0, "concurrency": 128},
        },
        qwen={
            "run": "runs/qwen2.5-7b",
            "model": {"path": "Qwen/Qwen2.5-7B-Instruct"},
            "questions": {"source": "files", "kind": "", "countries": 0, "train": "data/train.jsonl",
                          "validation": "data/validation.jsonl", "test": "data/test.jsonl"},
            "system_prompt": "",  # made from the tools' descriptions
            "tools": {
                "search": {"corpus": "data/corpus.jsonl", "top_n": 4, "max_chars": 1200},
                "python": {"timeout_seconds": 120.0, "memory_mib": 2048, "workers": 32},
            },
            "policy": {"backend": "sglang", "slots": 64, "context": 6096, "chunk": 512,
                       "url": "http://127.0.0.1:30000", "timeout": 600.0, "patience": 1800.0, "colocated": False},
            "reviser": {"url": "http://127.0.0.1:30000/v1", "model": "Qwen/Qwen2.5-7B-Instruct", "temperature": 0.6,
                        "max_tokens": 4096, "concurrency": 64},
            "rollout": {"calls_per_tool": 6, "calls": 6, "seconds": 900.0, "concurrency": 256},
        },
    )  # fmt: skip
    config.preset = preset
    config.seed = 4  # on the worlds of seeds 0 to 3 the settings were chosen
    config.remat = "none" if preset == "tiny" else "full"
    config.attention = "auto"
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1} if preset == "tiny" else {"data": 1, "fsdp": -1, "tensor": 1}
    config.lora = {"rank": 0, "alpha": 16.0, "targets": ("query", "key", "value", "output", "gate", "up", "down")}
    config.frozen = ()
    config.stages = ()
    return config
