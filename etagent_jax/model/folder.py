"""config.json of a Hugging Face model folder: read into a ModelConfig, written from one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etagent_jax.model.rotary import Llama3Scaling
from etagent_jax.model.transformer import Family, ModelConfig

ARCHITECTURES: dict[str, Family] = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
DTYPES = ("float32", "bfloat16", "float16")

# What transformers takes where config.json is silent.
QWEN3_HEAD_DIM = 128
ROPE_THETA = 10_000.0
MAX_WINDOW_LAYERS = 28


def read_config(folder: str | Path) -> ModelConfig:
    """The model in `folder`; dtype and param_dtype are both the folder's.

    ValueError names what config.json holds that is wrong or that we do not have.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
    family = ARCHITECTURES[architecture]

    def positive(name: str, default: int | None = None) -> int:
        value = default if raw.get(name) is None else raw[name]
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {name} must be a positive whole number, got {value!r}")
        return value

    layers, heads = positive("num_hidden_layers"), positive("num_attention_heads")
    hidden, head_dim = positive("hidden_size"), QWEN3_HEAD_DIM
    if family != "qwen3":
        head_dim = hidden // heads
    _refuse_what_we_do_not_have(raw, layers, path)
    theta, scaling = _rope(raw, path)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(raw.get("rms_norm_eps"), float):
        raise ValueError(f"{path}: rms_norm_eps must be a number such as 1e-6, got {raw.get('rms_norm_eps')!r}")
    try:
        return ModelConfig(
            vocab_size=positive("vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=positive("num_key_value_heads"),
            head_dim=positive("head_dim", head_dim),
            family=family,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=raw["rms_norm_eps"],
            tie_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=family != "qwen2" and raw.get("attention_bias", False),
            mlp_bias=family == "llama" and raw.get("mlp_bias", False),
            max_position=positive("max_position_embeddings"),
            dtype=dtype,
            param_dtype=dtype,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def hugging_face_config(c: ModelConfig, eos_ids: Sequence[int], pad_id: int) -> dict[str, Any]:
    """The config.json of a model of this shape, in the spelling that old and new transformers read."""
    architecture = next(name for name, family in ARCHITECTURES.items() if family == c.family)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    config: dict[str, Any] = {
        "architectures": [architecture], "model_type": c.family, "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_position, "hidden_act": "silu",
        "dtype": c.dtype, "torch_dtype": c.dtype, "pad_token_id": pad_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
    }  # fmt: skip
    if c.family != "llama":
        config["use_sliding_window"] = False
    if c.family != "qwen2":
        config["attention_bias"] = c.attention_bias
    if c.family == "llama":
        config["mlp_bias"] = c.mlp_bias
    if c.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_max_position,
        }
        config["rope_scaling"] = scaling
        rope |= scaling
    return config | {"rope_theta": c.rope_theta, "rope_parameters": rope}


def check_vocabulary(config: ModelConfig, tokenizer_size: int, where: str | Path) -> None:
    """ValueError if a tokenizer of `tokenizer_size` tokens has ids for which the model has no embedding."""
    if tokenizer_size > config.vocab_size:
        raise ValueError(f"{where}: the tokenizer has {tokenizer_size} tokens, the model's embedding only "
                         f"{config.vocab_size}; they do not belong together")  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; a Hugging Face model folder has a {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _refuse_what_we_do_not_have(raw: dict[str, Any], layers: int, path: Path) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set; take the folder of the model that is not quantized")
    if raw.get("use_sliding_window") and raw.get("sliding_window", "default") is not None:
        kinds = raw.get("layer_types")
        if kinds is None:
            slides = raw.get("max_window_layers", MAX_WINDOW_LAYERS) < layers
        else:
            slides = "sliding_attention" in kinds
        if slides:
            raise ValueError(f"{path}: layers with sliding-window attention are not supported")


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, Llama3Scaling | None]:
    """rope_theta and scaling, in the new spelling (rope_parameters) or the old (rope_theta, rope_scaling)."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or ROPE_THETA)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: rope scaling of type {kind!r} is not supported, only 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in rope]
    if missing:
        raise ValueError(f"{path}: rope scaling of type 'llama3' lacks {', '.join(missing)}")
    try:
        return theta, Llama3Scaling(*(rope[name] for name in names))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
