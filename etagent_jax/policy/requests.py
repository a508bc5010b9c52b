"""A request to `/generate` of SGLang's HTTP API, read from JSON and checked."""

import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etagent_jax.policy.interface import Sampling
from etagent_jax.tokenizer import Tokenizer

FIELDS = (
    "input_ids", "text", "sampling_params", "return_logprob", "logprob_start_len", "rid",
    "log_metrics", "no_logs", "session_id", "conversation_id", "routing_key", "priority", "custom_labels",
)  # fmt: skip
"""What a request may hold.  Those of the second line are SGLang's, and change nothing here."""

_NOTHING: tuple[Any, ...] = (False, "", [], {})  # False equals 0
LACKING: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "model", "stream", "return_text_in_logprobs", "top_logprobs_num", "token_ids_logprob", "return_hidden_states",
        "return_routed_experts", "routed_experts_start_len", "return_indexer_topk", "return_sampling_mask",
        "sampling_logprobs_mode", "return_flat_raw_top_logprobs", "return_flat_raw_output_top_logprobs",
        "return_flat_raw_top_logprobs_b64", "return_bytes", "return_entropy", "return_prompt_token_ids",
        "input_embeds", "image_data", "video_data", "audio_data", "modalities", "use_audio_in_video",
        "lora_path", "lora_id", "custom_logit_processor", "session_params", "background", "require_reasoning",
        "max_thinking_tokens", "extra_key", "cache_salt", "bootstrap_host", "bootstrap_port", "bootstrap_room",
        "routed_dp_rank", "data_parallel_rank",
    ),
    _NOTHING,
)  # fmt: skip
"""Fields of SGLang's that we have not, with the values (null besides) that ask for nothing."""

SAMPLING_DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 128, "stop": [], "sampling_seed": 0,
    "no_stop_trim": False, "skip_special_tokens": True, "spaces_between_special_tokens": True,
}  # fmt: skip
"""The sampling parameters there are, with SGLang's defaults; only that the default seed is a random one."""

LACKING_SAMPLING: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 1 << 30), "n": (1,), "beam_width": (1,), "repetition_penalty": (1,),
} | dict.fromkeys(
    (
        "min_p", "frequency_penalty", "presence_penalty", "min_new_tokens", "json_schema", "regex", "ebnf",
        "structural_tag", "ignore_eos", "stop_token_ids", "stop_regex", "logit_bias", "custom_params",
    ),
    _NOTHING,
)  # fmt: skip
"""As LACKING."""

STOP_CHARACTERS = 256  # each is a row of the stop table, 0.6 MB at a vocabulary of 152,064
ID_CHARACTERS = 256
UNBOUNDED = 1 << 30
MAX_FLOAT = 1e6


class Refused(Exception):
    """Why a request is not served, in one sentence, and the HTTP status for it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class GenerateRequest:
    """A checked request.

    id: the client's `rid`, or a random one.  parameters: the sampling parameters, defaults filled in.
    sampling: None to score only.  logprob_start: the first input token with a log-probability, the
    number of them for none.
    """

    id: str
    ids: tuple[int, ...]
    parameters: dict[str, Any]
    sampling: Sampling | None
    with_logprobs: bool
    logprob_start: int


def read_request(body: Mapping[str, Any], tokenizer: Tokenizer) -> GenerateRequest:
    """The request in a JSON object; Refused, naming the field, for what is wrong or not served here.

    Whether the ids are of the vocabulary, and fit, is the engine's to say.
    """
    refuse_unknown("field", body, FIELDS, LACKING)
    parameters = _sampling_parameters(body)
    ids = _input_ids(body, tokenizer)
    with_logprobs = _optional(body, "return_logprob", False)
    start = _optional(body, "logprob_start_len", -1)
    if not -1 <= start <= len(ids):
        raise Refused(f"logprob_start_len must be -1 (none) or 0 to {len(ids)} tokens, got {start!r:.50}")
    request_id = _optional(body, "rid", "") or uuid.uuid4().hex
    if len(request_id) > ID_CHARACTERS:
        raise Refused(f"rid may have {ID_CHARACTERS} characters, got {len(request_id)}")
    try:
        sampling = _sampling(parameters) if parameters["max_new_tokens"] else None
    except ValueError as error:
        raise Refused(str(error)) from error
    start = start if with_logprobs and start >= 0 else len(ids)
    return GenerateRequest(request_id, ids, parameters, sampling, with_logprobs, start)


def refuse_unknown(
    what: str, given: Mapping[str, Any], known: tuple[str, ...], lacking: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refused for a name that is not known, and for a lacking one whose value asks for something."""
    for name in sorted(given.keys() - known):
        if name not in lacking:
            raise Refused(f"unknown {what} {name!r:.100}; there are {', '.join(known)}")
        if given[name] is not None and given[name] not in lacking[name]:
            raise Refused(f"{what} {name!r} is not served here; leave it out, or give {lacking[name][0]!r}")


def _optional(body: Mapping[str, Any], name: str, default: Any) -> Any:
    """The field, if it is of the default's type; the default for one left out or null."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not type(default):
        raise Refused(f"{name} must be of type {type(default).__name__}, got {value!r:.50}")
    return value


def _input_ids(body: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise Refused("needs either input_ids, a list of token ids, or text")
    if text is not None:
        if not isinstance(text, str):
            raise Refused("text must be one string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise Refused("text holds half of a surrogate pair")
        return tokenizer.encode_start(text)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise Refused("input_ids must be one list of integers")
    return tuple(ids)


def _sampling_parameters(body: Mapping[str, Any]) -> dict[str, Any]:
    """Checked for their types, the defaults filled in."""
    given = _optional(body, "sampling_params", {})
    refuse_unknown("sampling parameter", given, tuple(SAMPLING_DEFAULTS), LACKING_SAMPLING)
    usual = SAMPLING_DEFAULTS | {"sampling_seed": random.getrandbits(32)}
    if "max_new_tokens" in given:
        usual["max_new_tokens"] = UNBOUNDED  # null, as SGLang has it
    parameters = {name: default if given.get(name) is None else given[name] for name, default in usual.items()}
    for name, value in parameters.items():
        default = SAMPLING_DEFAULTS[name]
        if name == "stop":
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise Refused("stop must be a string or a list of strings")
            if sum(map(len, texts)) > STOP_CHARACTERS or len(texts) > STOP_CHARACTERS:
                raise Refused(f"stop strings may have {STOP_CHARACTERS} characters in all")
            parameters["stop"] = texts
        elif type(value) not in ((int, float) if type(default) is float else (type(default),)):
            raise Refused(f"{name} must be of type {type(default).__name__}, got {value!r:.50}")
        elif type(default) is float and abs(value) > MAX_FLOAT:
            raise Refused(f"{name} is too large")
    return parameters


def _sampling(parameters: dict[str, Any]) -> Sampling:
    return Sampling(
        temperature=parameters["temperature"], top_p=parameters["top_p"], stop=tuple(parameters["stop"]),
        max_new_tokens=parameters["max_new_tokens"], seed=parameters["sampling_seed"],
    )  # fmt: skip
