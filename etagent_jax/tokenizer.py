"""Text to tokens and back for one model folder: the chat prompt, tool results, decoding."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class Tokenizer:
    """A Hugging Face tokenizer as this project uses it.

    special_tokens: strings that must never be encoded from untrusted text (see protocol.neutralise).
    eos_ids: token ids that end a turn, the tokenizer's own first, then `more_eos_ids`.
    vocab_size: one more than the highest id.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, more_eos_ids: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special_tokens = tuple(sorted({*tokenizer.all_special_tokens, *added}))
        own_eos_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.eos_ids = tuple(dict.fromkeys((*own_eos_ids, *more_eos_ids)))
        if not self.eos_ids:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.pad_id: int = self.eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a model folder (or hub id); raises OSError that names it when there is no tokenizer.

        A turn also ends at the ids that the folder's generation_config.json and config.json call
        `eos_token_id`: chat models end theirs with another token than texts.
        """
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        eos_ids: list[int] = []
        try:
            for path in (Path(folder) / name for name in ("generation_config.json", "config.json")):
                given = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
                eos_ids += given if isinstance(given, list) else [] if given is None else [given]
            return cls(tokenizer, eos_ids)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))

    def prompt(self, system: str, question: str) -> tuple[int, ...]:
        """Token ids of the chat prompt, ready for the assistant's turn."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, nothing added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_start(self, text: str) -> tuple[int, ...]:
        """As `encode`, with what the tokenizer puts before a text (Llama's <|begin_of_text|>)."""
        return tuple(self._tokenizer.encode(text))

    def check_writes(self, texts: Iterable[str]) -> None:
        """ValueError if one of `texts`, such as an agent's tags, does not come back from its tokens."""
        for text in texts:
            if self.decode(self.encode(text)) != text:
                raise ValueError(
                    f"the tokenizer cannot write {text} (it comes back as {self.decode(self.encode(text))!r}); "
                    "use a byte-level one, or add the missing characters to its vocabulary"
                )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special ones included, nothing tidied."""
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
