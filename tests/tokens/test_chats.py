"""Conversations: by a chat template to ids, and whose each token is."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from endwise import RunConfig, load_corpora, train
from endwise.common.errors import ConfigError, DataError, NoTokenizer
from endwise.config.run import DataConfig
from endwise.evaluation.evaluate import evaluate
from endwise.tokens.chats import Chat, ChatEncoding
from small_gpt2 import recipe

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
PLAIN = f"{{% for m in messages %}}{TURN}{{% endfor %}}"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m['content'] | trim }}<|im_end|>{% endif %}\n{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": " Hello, hello? "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Be short."},
    {"role": "assistant", "content": "Yes: user Hello"},
]


@pytest.fixture(scope="module")
def make():
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    model.train_from_iterator([message["content"] for message in CHAT] * 3, trainer)

    def made(template=PLAIN, eos="<eos>"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=eos)
        tokenizer.chat_template = template
        return tokenizer

    return made


def kept_text(tokenizer, left_out, chat=None):
    """The text of the tokens that count."""
    ids, left = ChatEncoding(tokenizer, left_out).encoded(Chat.of(chat or CHAT, "here"))
    return [tokenizer.decode(run[~left[at]]) for at, run in by_run(ids, left)]


def by_run(ids, left):
    edges = np.flatnonzero(np.diff(left)) + 1
    places = np.split(np.arange(len(ids)), edges)
    return [(place, ids[place]) for place in places if not left[place[0]]]


def test_each_token_is_of_the_message_that_it_stands_in(make):
    tokenizer = make()
    assert kept_text(tokenizer, ("system", "template", "user")) == ["Hello.", "Yes: user Hello"]
    assert kept_text(tokenizer, ("system", "assistant", "template")) == ["Hello, hello?", "Be short."]
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert kept_text(tokenizer, ()) == [whole]
    told = kept_text(tokenizer, ("user",))
    assert "".join(told) == whole.replace("user\nHello, hello?", "user\n").replace("user\nBe short.", "user\n")
    ids, _ = ChatEncoding(tokenizer, ()).encoded(Chat.of(CHAT, "here"))
    assert ids.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_marks_of_what_is_generated_say_what_is_the_assistants(make):
    tokenizer = make(MARKED)
    spoken = ["Hello.<|im_end|>", "Yes: user Hello<|im_end|>"]
    assert kept_text(tokenizer, ("system", "template", "user")) == spoken
    ids, left = ChatEncoding(tokenizer, ("system", "template", "user")).encoded(Chat.of(CHAT, "here"))
    theirs = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert (~left).tolist() == [bool(each) for each in theirs["assistant_masks"]] and len(ids) == len(left)
    assert kept_text(tokenizer, ("assistant", "template")) == ["Be short.", "Hello, hello?", "Be short."]


def test_a_template_that_refuses_part_of_a_conversation_serves_as_well(make):
    chat = CHAT[1:]
    assert kept_text(make(STRICT), ("user", "template"), chat) == ["Hello.", "Yes: user Hello"]
    with pytest.raises(DataError, match=r"here: the chat template does not take .* roles must alternate"):
        kept_text(make(STRICT), ("user",))


def test_a_message_without_text_and_one_that_is_not_written_have_no_tokens(make):
    template = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}"
    chat = [*CHAT[:2], {"role": "assistant", "content": ""}]
    assert kept_text(make(template), ("user", "template"), chat) == []
    assert kept_text(make(template), ("template",), chat) == ["Hello, hello?"]


def test_a_content_that_is_written_otherwise_is_refused(make):
    template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"message 1 \(system\), so that.*data\.leave_out_tokens"):
        kept_text(make(template), ("user",))


def lines_of(folder, chats, key="messages"):
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps({key: chat}) + "\n" for chat in chats))
    return file


def many(count=24):
    return [[*CHAT[:-1], {"role": "assistant", "content": f"Yes: {number} Hello"}] for number in range(count)]


def load(source, tokenizer, tmp_path, **settings):
    data = DataConfig(source=str(source), cache=tmp_path / "cache", **{"context": 16, **settings})
    return load_corpora(
        data, tokenizer=tokenizer, model_context=None, vocab_size=300, training_tokens=64, evaluation_tokens=16
    )


def counted(corpus):
    batch = corpus.batch(range(len(corpus)))
    return batch.tokens[batch.mask]


@pytest.mark.parametrize("packing", ["stream", "document"])
@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
@pytest.mark.parametrize("streaming", [False, True])
def test_from_a_file_to_sequences(make, tmp_path, packing, eos, streaming):
    """The same tokens as without roles, fewer of them counted; twice, the second time from the cache."""
    tokenizer, source = make(eos=eos), lines_of(tmp_path, many())
    settings = {"packing": packing, "streaming": streaming}
    plain = load(source, tokenizer, tmp_path, **settings)
    for _ in range(2):
        kept = load(source, tokenizer, tmp_path, leave_out_roles=["system", "user", "template"], **settings)
        for one, other in ((plain.train, kept.train), (plain.heldout, kept.heldout)):
            batches = [each.batch(range(len(each))) for each in (one, other)]
            assert torch.equal(batches[0].tokens, batches[1].tokens)
            assert not (batches[1].mask & ~batches[0].mask).any()
            assert one.fingerprint() != other.fingerprint()
            text = tokenizer.decode(counted(other))
            assert text.startswith("Hello.Yes: ") and "short" not in text and "<" not in text
        documents = [len(each.train.documents) + len(each.heldout.documents) for each in (plain, kept)]
        assert documents[0] == documents[1] and (streaming or documents[1] == 24)
    if packing == "document" and not streaming:
        starts = kept.train.batch(range(len(kept.train))).tokens[:, 0]
        assert (starts == tokenizer.convert_tokens_to_ids("<|im_start|>")).sum() == len(kept.train.documents)


def test_parquet_and_saved_data_sets_hold_conversations_too(make, tmp_path):
    tokenizer, chats = make(), many()
    chats[3] = [{"role": "user", "content": "Be", "name": "x"}, *chats[3]]
    expected = load(lines_of(tmp_path, chats), tokenizer, tmp_path, leave_out_roles=["user"]).train.fingerprint()
    parquet.write_table(pa.table({"messages": chats, "id": range(24)}), tmp_path / "chats.parquet")
    from datasets import Dataset

    Dataset.from_dict({"messages": chats}).save_to_disk(tmp_path / "saved")
    for name in ("chats.parquet", "saved"):
        assert load(tmp_path / name, tokenizer, tmp_path, leave_out_roles=["user"]).train.fingerprint() == expected


BAD = {
    "no template": (many(), {}, {"template": None}, "tokenizer has no chat template"),
    "text": (None, {"leave_out_roles": ["user"]}, {}, "holds no conversations, whose messages have roles. Unset it"),
    "embedded": ("embedded", {"leave_out_roles": ["user"]}, {}, "the embedded corpus holds no conversations"),
    "other keys": ([[{"from": "human", "value": "x"}]], {}, {}, r"line 1: message 1 must have a role and a content"),
    "parts": ([[{"role": "user", "content": [{"type": "text"}]}]], {}, {}, "content that are text"),
    "mixed": ([[{"role": "user", "content": "x"}, 3]], {}, {}, "a list of token ids, or of messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_conversations_is_one_line(make, tmp_path, name):
    chats, settings, tokenizer, told = BAD[name]
    key = "messages" if chats else "text"
    source = chats if isinstance(chats, str) else lines_of(tmp_path, chats or ["Hello"] * 9, key)
    with pytest.raises(DataError, match=told):
        load(source, make(**tokenizer), tmp_path, **settings)


def test_without_a_tokenizer_there_is_no_template(tmp_path):
    with pytest.raises(NoTokenizer, match="holds conversations, but the model has no tokenizer"):
        load(lines_of(tmp_path, many()), None, tmp_path)


def test_a_role_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match=r"leave_out_roles\.0.*'system', 'developer'.*asistant"):
        DataConfig.build({"leave_out_roles": ["asistant"]}, "data")


def test_a_run_leaves_out_what_the_recipe_says(make, tmp_path):
    """From the model's folder, in which the template stands, to an evaluation that counts what is kept alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "model")
    make().save_pretrained(tmp_path / "model")
    values = recipe(tmp_path / "run", tokens=256).model_dump(mode="json", exclude_defaults=True)
    roles = ["system", "user", "template"]
    data = {"source": str(lines_of(tmp_path, many(60))), "leave_out_roles": roles, "cache": str(tmp_path / "cache")}
    values |= {"model": {"name": str(tmp_path / "model"), "device": "cpu"}, "data": data}
    values["evaluation"] = {"tokens": 256, "during_training_tokens": 128}
    run = train(RunConfig.build(values), display=False)
    measured = evaluate(run.folder)[run.folder]
    heldout = load(tmp_path / "chats.jsonl", make(), tmp_path, leave_out_roles=roles).heldout
    assert 0 < measured.tokens == int(heldout.batch(range(16)).mask.sum()) < 256
