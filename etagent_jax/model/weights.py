"""Hugging Face model folders: read into a Transformer, written from one."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from etagent_jax.model.transformer import ModelConfig, Remat, Transformer

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

# Where each tensor of a Hugging Face Qwen checkpoint lives in ours; kernels are transposed there.
LAYER_KEYS = {
    r"self_attn\.([qkv])_proj\.(weight|bias)": ("attention", {"q": "query", "k": "key", "v": "value"}),
    r"self_attn\.(o)_proj\.(weight)": ("attention", {"o": "output"}),
    r"self_attn\.([qk])_norm\.(weight)": ("attention", {"q": "query_norm", "k": "key_norm"}),
    r"mlp\.(gate|up|down)_proj\.(weight)": ("feed_forward", {"gate": "gate", "up": "up", "down": "down"}),
    r"(input|post_attention)_layernorm\.(weight)": (
        None,
        {"input": "attention_norm", "post_attention": "feed_forward_norm"},
    ),
}
TOP_KEYS = {
    "model.embed_tokens.weight": ("embedding",),
    "model.norm.weight": ("norm", "scale"),
    "lm_head.weight": ("head", "kernel"),
}


def read_config(folder: str | Path) -> ModelConfig:
    """The shape of the model in `folder`; ValueError names what it holds that we do not support."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; a Hugging Face model folder has a config.json")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{path}: use_sliding_window is set, which is not supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path}: rope scaling {rope} is not supported")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} must be set")
    is_qwen3 = ARCHITECTURES[architecture] == "qwen3"
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=raw.get("tie_word_embeddings", False),
        qkv_bias=raw.get("attention_bias", False) if is_qwen3 else True,
        qk_norm=is_qwen3,
        max_position=raw["max_position_embeddings"],
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
    )


def hugging_face_config(c: ModelConfig, eos_id: int, pad_id: int) -> dict[str, Any]:
    """The config.json of a model of this shape, in the spelling that old and new transformers read."""
    architecture = "Qwen3ForCausalLM" if c.qk_norm else "Qwen2ForCausalLM"
    return {
        "architectures": [architecture], "model_type": ARCHITECTURES[architecture], "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "rope_theta": c.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tie_embeddings, "attention_bias": c.qkv_bias,
        "max_position_embeddings": c.max_position, "hidden_act": "silu", "use_sliding_window": False,
        "dtype": c.dtype, "torch_dtype": c.dtype, "eos_token_id": eos_id, "pad_token_id": pad_id,
    }  # fmt: skip


def location(key: str) -> tuple[tuple[str, ...], int | None] | None:
    """Path of our parameter for a Hugging Face `key`, and its layer; None for a key we do not know."""
    if key in TOP_KEYS:
        return TOP_KEYS[key], None
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
    if match is None:
        return None
    for pattern, (part, names) in LAYER_KEYS.items():
        inner = re.fullmatch(pattern, match.group(2))
        if inner is not None:
            name = names[inner.group(1)]
            leaf = "bias" if inner.group(2) == "bias" else "scale" if name.endswith("norm") else "kernel"
            return ("layers", *([part] if part else []), name, leaf), int(match.group(1))
    return None


def load(folder: str | Path, remat: Remat = "none", dtype: str | None = None) -> Transformer:
    """The model in a Hugging Face `folder` (safetensors), its parameters as `dtype` (default: the folder's).

    Raises ValueError naming the file and tensor if one is missing, unknown, or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype is not None:
        config = ModelConfig(**{**config.__dict__, "dtype": dtype})
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), remat))
    graph, abstract = nnx.split(model)
    flat = dict(nnx.to_flat_state(abstract))
    arrays = {path: np.empty(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    filled = dict.fromkeys(flat, 0)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no .safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    _place(key, tensors.get_tensor(key), arrays, filled, file, config)
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read as safetensors ({error}); copy it again") from error
    missing = [".".join(map(str, p)) for p, n in filled.items() if n < (config.num_layers if p[0] == "layers" else 1)]
    if missing:
        raise ValueError(f"{folder}: tensors for {', '.join(missing)} are missing")
    leaves = [(path, leaf.replace(jax.numpy.asarray(arrays[path]))) for path, leaf in flat.items()]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _place(key: str, tensor: np.ndarray, arrays: dict, filled: dict, file: Path, config: ModelConfig) -> None:
    """Copy one checkpoint tensor to where it belongs."""
    found = location(key)
    if found is None or found[0] not in arrays:
        if key == "lm_head.weight" and config.tie_embeddings:
            return
        raise ValueError(f"{file}: unknown tensor {key}")
    path, layer = found
    target = arrays[path] if layer is None else arrays[path][layer]
    value = tensor.T if path[-1] == "kernel" else tensor
    if value.shape != target.shape:
        raise ValueError(f"{file}: {key} has shape {tensor.shape}, the configuration asks for {target.shape}")
    target[...] = value
    filled[path] += 1


def tensors(model: Transformer) -> dict[str, np.ndarray]:
    """The parameters of `model` under their Hugging Face keys, contiguous, on the host."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    flat = {tuple(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    parts = {"attention": "self_attn", "feed_forward": "mlp"}
    names = {
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj", "query_norm": "q_norm",
        "key_norm": "k_norm", "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
        "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    }  # fmt: skip
    top = {path: key for key, path in TOP_KEYS.items()}
    out: dict[str, np.ndarray] = {}
    for path, value in flat.items():
        orient = (lambda x: x.T) if path[-1] == "kernel" else (lambda x: x)
        if path in top:
            out[top[path]] = np.ascontiguousarray(orient(value))
            continue
        leaf = "bias" if path[-1] == "bias" else "weight"
        prefix = f"{parts[path[1]]}." if path[1] in parts else ""
        for i in range(value.shape[0]):
            out[f"model.layers.{i}.{prefix}{names[path[-2]]}.{leaf}"] = np.ascontiguousarray(orient(value[i]))
    return out


def save(model: Transformer, folder: str | Path, eos_id: int, pad_id: int) -> None:
    """Write config.json and model.safetensors, as transformers and SGLang read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(model.config, eos_id, pad_id), indent=2))
    save_file(tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
