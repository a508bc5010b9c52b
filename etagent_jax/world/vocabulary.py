"""The tiny tokenizer: the built-in world's syllables, words and phrases over a complete set of bytes."""

import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from etagent_jax import protocol
from etagent_jax.tools.python import EMPTY_OUTPUT
from etagent_jax.tools.search import NO_RESULTS
from etagent_jax.world import SYSTEM_PROMPT, TOOLS, World, demonstrations, solver
from etagent_jax.world.entities import RELATIONS

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The spaces around a name belong to the phrases beside it, so that a name is the same tokens everywhere.
PHRASES = (
    "What is the ", " What is the ", "What is ", "The ", " of ", " of the ", " is ", " is a ", "country", "city",
    " times the ", " plus ", " + ", " - ", " * ", "print(", ")", "x = ", "x", "\\boxed{", "}", "\n", " ",
    "I need the ", " I need the ", "I search for ", " I search for ",
    "NameError: name '", "' is not defined", EMPTY_OUTPUT, NO_RESULTS, "no calls left", demonstrations.UNKNOWN,
    "system\n", "user\n", "assistant\n", SYSTEM_PROMPT, *RELATIONS, *"0123456789.,?",
)  # fmt: skip
THOUGHTS = (
    solver.GIVEN_THOUGHT, solver.COMPUTE_THOUGHT, solver.KNOWN_THOUGHT, demonstrations.GUESS_THOUGHT,
    demonstrations.CHECK_THOUGHT, demonstrations.HEAD_THOUGHT, demonstrations.GIVE_UP_THOUGHT,
    demonstrations.PRINT_THOUGHT, demonstrations.LONG_THOUGHT, *demonstrations.HINTS,
)  # fmt: skip

PIECE_SCORE, BYTE_SCORE = -1.0, -20.0


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level Unigram tokenizer with the world's syllables; 426 tokens, the same for every seed.

    The likeliest segmentation is the one of fewest pieces, bytes only where no piece fits, so a
    name is its syllables, a number its digits, and any text comes back unchanged.  Protocol tags are
    single tokens but not special; the end of a turn is `<|im_end|>`, padding `<|endoftext|>`.

    Saved beside a config.json of model type qwen3 it loads with AutoTokenizer; beside qwen2 it does
    not (transformers 5 then builds Qwen2's own pre-tokenizer and ignores this one).
    """
    # Twice, because a thought may stand alone or, after a space, follow another.
    words = [word for thought in THOUGHTS for word in re.findall(r" ?[A-Za-z]+", f"{thought} {thought}")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = {}
    for text in (*PHRASES, *words, *world.syllables):
        ((piece, _),) = byte_level.pre_tokenize_str(text)
        pieces[piece] = PIECE_SCORE
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        pieces.setdefault(byte, BYTE_SCORE)

    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=None, byte_fallback=False))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, TURN_START, TURN_END)])
    tags = [tag(name) for name in (*protocol.RESERVED, *TOOLS) for tag in (protocol.opening, protocol.closing)]
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PAD, chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
