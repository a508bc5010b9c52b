"""Whether a server serves the model and the tokenizer that the learner has."""

import json
from pathlib import Path
from typing import Any

from etagent_jax.policy.http import Broken, Http, SGLangError
from etagent_jax.tokenizer import Tokenizer

KIND = ("model_type", "architectures")
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
SAMPLE = "größer 🙂 <search>東京</search> 1234\n\tdef f(x):  # it's"


def check_model(url: str, info: dict[str, Any], folder: Path) -> int | None:
    """SGLangError if `/model_info` of the server, or the folder that it names, is another model than `folder`'s.

    The folder that it names is compared where this machine can read it.  Returns folder's vocab_size.
    """
    ours = json.loads((folder / "config.json").read_text())
    theirs = {name: info[name] for name in KIND if info.get(name) is not None}
    path = Path(str(info.get("model_path", "")), "config.json")
    if path.is_file():
        config = json.loads(path.read_text())
        theirs |= {name: config[name] for name in (*KIND, *SHAPE) if name in config}
    for name, value in theirs.items():
        if name in ours and value != ours[name]:
            raise SGLangError(
                f"{url} serves {info.get('model_path')}, whose {name} is {value}, and {folder} has {ours[name]}: "
                "start the server with the learner's model"
            )
    vocab_size = ours.get("vocab_size")
    return vocab_size if isinstance(vocab_size, int) else None


async def check_tokenizer(
    http: Http, url: str, info: dict[str, Any], tokenizer: Tokenizer, folder: str, seconds: float
) -> None:
    """SGLangError if the server makes other tokens of a text than `tokenizer`, the one of `folder`."""
    text = SAMPLE + "".join(tokenizer.special_tokens)
    body = {"text": text, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": 0}
    answer = await http.ask("POST", f"{url}/generate", body, seconds=seconds)
    try:
        theirs = [row[1] for row in answer["meta_info"]["input_token_logprobs"]]
    except (LookupError, TypeError) as error:
        raise Broken(f"{url}/generate does not say the tokens of a text: {answer!r:.300}") from error
    ours = list(tokenizer.encode_start(text))
    if theirs != ours:
        name = info.get("tokenizer_path") or info.get("model_path")
        i = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours)))
        raise SGLangError(
            f"{url} has the tokenizer of {name}, another than {folder}'s: token {i} of {text!r} is "
            f"{theirs[i : i + 1]} there and {ours[i : i + 1]} here; start the server with the learner's model"
        )
