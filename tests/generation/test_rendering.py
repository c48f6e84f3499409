"""Text out of what was generated reads alike under every template, and a reasoning budget closes as the template does."""

import pytest

from step_megatron.config.schema import TokenizerConfig
from step_megatron.data.template import THINK_END
from step_megatron.evaluation.scoring import split_reply
from step_megatron.generation.rendering import Rendering
from step_megatron.generation.request import Generation


class Letters:
    """A tokenizer of single characters, with the marks as ids of their own."""

    pad_id = 0
    marks = {THINK_END: 1, "<|im_end|>": 2, "<|EOT|>": 3}

    def special(self, name):
        return self.marks[name]

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        names = {number: name for name, number in self.marks.items()}
        return "".join(names.get(number) or chr(number) for number in ids)


def text(template, written, reason="stop"):
    rendering = Rendering(Letters(), TokenizerConfig(template=template))
    ids = [*Letters().encode(written), 2] if reason == "stop" else Letters().encode(written)
    return rendering.text(Generation(ids, finish_reason=reason))


def test_chatml_replies_read_like_the_others():
    assert split_reply(text("chatml", "<think>\na\n</think>\n\nb")) == split_reply("a</think>b")
    assert split_reply(text("chatml", "just b")).answer == "just b"
    assert text("step-audio", "a</think>b") == "a</think>b"


def test_a_reply_that_was_cut_keeps_its_last_token():
    assert text("step-audio", "ab", "length") == "ab"


@pytest.mark.parametrize(("template", "after"), [("step-audio", "\n"), ("chatml", "\n\n")])
def test_a_budget_closes_as_the_template_does(template, after):
    rendering = Rendering(Letters(), TokenizerConfig(template=template))
    budget = rendering.budget(5)
    assert Letters().decode(budget.closing) == f"\n{THINK_END}{after}" and budget.endings == ((1,),) and budget.tokens == 5
    assert rendering.budget(0) is None
    assert rendering.stop_ids == (Letters().special("<|EOT|>" if template == "step-audio" else "<|im_end|>"), 0)
