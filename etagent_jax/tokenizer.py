"""Text to tokens and back for one model folder: the chat prompt, tool results, decoding."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


class Tokenizer:
    """A Hugging Face tokenizer as this project uses it.

    special_tokens: strings that must never be encoded from untrusted text (see protocol.neutralise).
    eos_ids: token ids that end a turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self.special_tokens = tuple(sorted({*tokenizer.all_special_tokens, *added}))
        self.eos_ids = (tokenizer.eos_token_id,)
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a model folder (or hub id); raises OSError that names it when there is no tokenizer."""
        return cls(AutoTokenizer.from_pretrained(str(folder)))

    def save(self, folder: str | Path) -> None:
        self._tokenizer.save_pretrained(str(folder))

    def prompt(self, system: str, question: str) -> tuple[int, ...]:
        """Token ids of the chat prompt, ready for the assistant's turn."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        return tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text` alone, nothing added."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special ones included, nothing tidied."""
        return str(
            self._tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
