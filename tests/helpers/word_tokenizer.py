"""A tokenizer of forty words, which counts the texts that it is given."""

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = 40
VOCAB = WORDS + 3
EOS, BOS, UNK = WORDS, WORDS + 1, WORDS + 2


class CountingTokenizer(PreTrainedTokenizerFast):
    texts = 0

    def __call__(self, text, *arguments, **options):
        self.texts += len(text)
        return super().__call__(text, *arguments, **options)


def make_tokenizer(kind=CountingTokenizer, **special):
    """Word `w7` has id 7."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"<eos>": EOS, "<bos>": BOS, "<unk>": UNK}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"} | special
    return kind(tokenizer_object=backend, **{key: value for key, value in tokens.items() if value})


def word_tokenizer(words: list[str], lower: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: place for place, word in enumerate(["<eos>", "<unk>", *words])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    if lower:
        made.normalizer = Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")
