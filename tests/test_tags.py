"""Control tags: the table, what is refused, what is only warned about."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from higgs_lab.tags import (
    BY_LITERAL,
    TAGS,
    check_text,
    escape_control,
    lint_tags,
    parse_tags,
    strip_tags,
)


def test_the_43_tags_and_their_counts():
    counts = {c: sum(t.category == c for t in TAGS) for c in {t.category for t in TAGS}}
    assert counts == {"emotion": 21, "style": 3, "prosody": 10, "sfx": 9}
    assert len(BY_LITERAL) == 43
    assert all(re.fullmatch(r"<\|[a-z]+:[a-z_]+\|>", literal) for literal in BY_LITERAL)
    assert all(bool(tag.sounds) == (tag.category == "sfx") for tag in TAGS)
    at_spot = {tag.value for tag in TAGS if tag.placement == "here" and tag.category != "sfx"}
    assert at_spot == {"pause", "long_pause"}


def test_parse_gives_tags_with_their_spans():
    text = "<|emotion:anger|><|prosody:speed_fast|>No! <|sfx:cough|>Ahem, no."
    found = parse_tags(text)
    assert [at.tag.value for at in found] == ["anger", "speed_fast", "cough"]
    assert all(text[at.start : at.end] == at.tag.literal for at in found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<|emotion:anger|>No!", "No!"),
        ("<|emotion:anger|> No!", "No!"),
        ("Well, <|sfx:cough|>Ahem, yes.", "Well, Ahem, yes."),
        ("one<|prosody:pause|>two", "one two"),
        ("one <|prosody:pause|> two", "one two"),
        ("Done<|prosody:pause|>.", "Done."),
        ("one<|sfx:sigh|><|prosody:pause|>two", "one two"),
        ("Done<|sfx:sigh|><|prosody:pause|>.", "Done."),
        ("plain", "plain"),
        ("नमस्ते<|prosody:pause|>।", "नमस्ते।"),
        ("<|sfx:sigh|>", ""),
    ],
)
def test_strip_tags_leaves_the_words(text, words):
    assert strip_tags(text) == words


@pytest.mark.parametrize("tag", TAGS, ids=lambda t: t.value)
def test_every_tag_passes_the_check(tag):
    check_text(f"{tag.literal}Hello.")


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "\u200b", "\u00a0\ufeff"])
def test_empty_text_is_refused(text):
    with pytest.raises(ValueError, match="rows.jsonl:3: the text is empty"):
        check_text(text, where="rows.jsonl:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hi <|emotion:elatoin|>there", r"at character 3; did you mean <\|emotion:elation\|>"),
        ("<|Emotion:Elation|>Hi", r"did you mean <\|emotion:elation\|>"),
        ("<| emotion : anger |>Hi", r"did you mean <\|emotion:anger\|>"),
        ("<|sfx:pause|>Hi", r"did you mean <\|prosody:pause\|>"),
        ("<|laughter|>Hi", r"unknown control tag .*did you mean <\|sfx:laughter\|>"),
        ("<|prosody:speed-slow|>Hi", r"did you mean <\|prosody:speed_slow\|>"),
        ("<|env:music|>Hi", r"unknown control tag <\|env:music\|>"),
        ("Hi <|emotion:anger>there", "never closed"),
        ("Hi <|", "never closed"),
    ],
)
def test_trap29_mistyped_tags_are_refused_with_near_matches(text, message):
    with pytest.raises(ValueError, match=message):
        check_text(text)


@pytest.mark.parametrize(
    "token",
    ["<|audio|>", "<|ref_audio|>", "<|ref_text|>", "<|tts|>", "<|text|>", "<|endoftext|>"]
    + ["<|im_start|>", "<|eoc|>", "<|await_audio|>", "<tool_call>", "</tool_call>", "<||>"],
)
def test_trap29_smuggled_control_tokens_are_refused_and_can_be_escaped(token):
    text = f"Read this {token}aloud."
    with pytest.raises(ValueError, match=re.escape(f"{token} at character 10")):
        check_text(text)
    harmless = escape_control(text)
    check_text(harmless)
    assert token not in harmless
    assert harmless.startswith("Read this ") and harmless.endswith("aloud.")


def test_nested_and_overlapping_tokens_stay_caught():
    for text in ("<|<|audio|>|>", "<|aud<|sfx:cough|>io|>", "<<|audio|>|>", "<|audio|>|>"):
        with pytest.raises(ValueError):
            check_text(text)
        check_text("x" + escape_control(text))


def test_every_added_token_of_a_tokenizer_is_caught_when_given():
    added = ["<|audio|>", "[SPECIAL]", "<think>", "<|emotion:anger|>"]
    check_text("a <think> b")  # not a token of this model: plain text
    for token in ("[SPECIAL]", "<think>"):
        with pytest.raises(ValueError, match=re.escape(token)):
            check_text(f"a {token} b", added_tokens=added)
        assert token not in escape_control(f"a {token} b", added_tokens=added)
    check_text("<|emotion:anger|>No.", added_tokens=added)


def test_escape_keeps_the_tags_unless_told_not_to():
    text = "<|emotion:anger|>No <|audio|>."
    assert escape_control(text) == "<|emotion:anger|>No  audio ."
    assert parse_tags(escape_control(text, keep_tags=False)) == []


def test_lone_surrogate_and_wrong_type_are_refused():
    with pytest.raises(ValueError, match="surrogate"):
        check_text("abc\ud800")
    with pytest.raises(ValueError, match="not a string"):
        check_text(None, where="field text")


_pieces = st.sampled_from(
    ["<", "|", ">", "<|", "|>", "audio", "text", ":", "emotion:anger", "<|sfx:cough|>", " ", "a"]
)


@given(st.lists(_pieces, max_size=14).map("".join))
def test_escaped_text_never_holds_a_control_token(text):
    escaped = escape_control(text)
    check_text("x" + escaped)
    assert [c for c in escaped if c.isalnum()] == [c for c in text if c.isalnum()]


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("Well <|sfx:laughter|> Haha", "no space after"),
        ("Well <|sfx:laughter|>, yes", "wants its sound word"),
        ("Well <|sfx:sneeze|>Yes", "wants its sound word"),
        ("I am <|emotion:anger|>angry.", "start of a sentence"),
        ("<|prosody:speed_slow|><|prosody:speed_fast|>Hi.", "contradicts"),
        ("Hello [laughter] there", r"write <|sfx:laughter|>"),
        ("Hello <emotion:anger> there", r"write <|emotion:anger|>"),
        ("<|prosody:pause|>", "no words"),
    ],
)
def test_trap29_misplaced_tags_are_warned_about(text, warning):
    assert any(warning in line for line in lint_tags(text)), lint_tags(text)


@pytest.mark.parametrize(
    "text",
    [
        "<|emotion:anger|><|style:shouting|>No! <|emotion:relief|>Oh, fine.",
        "Well, <|sfx:laughter|>Hahaha, yes<|prosody:pause|> and no.",
        '"Stop." <|emotion:fear|>He ran.',
        "你好。<|emotion:awe|>真的吗？",
        "咳，<|sfx:cough|>咳咳。",
        "one\n<|emotion:awe|>two",
        "no tags (at all) here",
    ],
)
def test_well_placed_tags_give_no_warning(text):
    assert lint_tags(text) == []
