"""The words of the dialogues: questions, replies as sentences, wishes about the form of a reply, replies in other languages."""

from collections.abc import Callable
from dataclasses import dataclass

from step_megatron.data.recipes.conversations import QUESTIONS

TASK_QUESTIONS = {**QUESTIONS, "pitch": ("Is the pitch low, mid or high?", "How high is the pitch?")}
# What is asked about, in a phrase.
NAMES = {
    "language": "language",
    "gender": "voice",
    "speaking_rate": "speed",
    "tone": "tone",
    "sound_event": "sound",
    "pitch": "pitch",
}
# Not first and second: those are tones.
NUMBERS = ("one", "two")
_SENTENCES = {
    "language": "The language is {}.",
    "gender": "This is a {} voice.",
    "speaking_rate": "The speech is {}.",
    "tone": "This is the {} tone.",
    "sound_event": "This is the sound of {}.",
    "pitch": "The pitch is {}.",
}
_ABOUT = {
    "language": "Clip {number} is in {}.",
    "gender": "Clip {number} has a {} voice.",
    "speaking_rate": "Clip {number} is {}.",
    "tone": "Clip {number} has the {} tone.",
    "sound_event": "Clip {number} is {}.",
    "pitch": "Clip {number} has a {} pitch.",
}
_WITH_ARTICLE = {"animal": "an animal", "drum": "a drum"}
# Sentence by task, and the labels' translations.
_TRANSLATIONS = {
    "Spanish": (
        {
            "language": "El idioma es {}.",
            "gender": "La voz es {}.",
            "speaking_rate": "El habla es {}.",
            "tone": "El tono es el {}.",
            "sound_event": "El sonido es de {}.",
        },
        {
            "English": "inglés", "Spanish": "español", "French": "francés", "Italian": "italiano", "Russian": "ruso",
            "male": "masculina", "female": "femenina", "slow": "lenta", "normal": "normal", "fast": "rápida",
            "first": "primero", "second": "segundo", "third": "tercero", "fourth": "cuarto",
            "animal": "animal", "drum": "tambor", "music": "música",
        },
    ),
    "French": (
        {
            "language": "La langue est le {}.",
            "gender": "La voix est {}.",
            "speaking_rate": "La parole est {}.",
            "tone": "Le ton est le {}.",
            "sound_event": "Le son vient de {}.",
        },
        {
            "English": "anglais", "Spanish": "espagnol", "French": "français", "Italian": "italien", "Russian": "russe",
            "male": "masculine", "female": "féminine", "slow": "lente", "normal": "normale", "fast": "rapide",
            "first": "premier", "second": "deuxième", "third": "troisième", "fourth": "quatrième",
            "animal": "animal", "drum": "tambour", "music": "musique",
        },
    ),
}  # fmt: skip


def sentence(task: str, label: str) -> str:
    """The reply to a question about one clip."""
    return _SENTENCES[task].format(_WITH_ARTICLE.get(label, label))


def about(task: str, label: str, number: int) -> str:
    """The reply about one clip of several; `number` counts from 0."""
    return _ABOUT[task].format(_WITH_ARTICLE.get(label, label), number=NUMBERS[number])


@dataclass(frozen=True)
class Wish:
    """What a user wants of the form of replies.

    Attributes:
        text: how it is said.
        apply: (task, label) -> the reply.
        word: a label as the reply has it.
        form, starts, ends: of `checks.Check`.
    """

    text: str
    apply: Callable[[str, str], str]
    word: Callable[[str], str] = str
    form: str = ""
    starts: str = ""
    ends: str = ""


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _in_language(language: str) -> Wish:
    sentences, words = _TRANSLATIONS[language]
    return Wish(
        f"Answer in {language}.",
        lambda task, label: sentences[task].format(words[label]),
        lambda label: words[label],
        form="sentence",
    )


ONE_WORD = Wish("Answer in one word.", lambda task, label: label, form="one_word")
FORMATS = (
    ONE_WORD,
    Wish("Write in capital letters.", lambda task, label: sentence(task, label).upper(), form="capitals"),
    Wish("Put your answer in brackets.", lambda task, label: f"({label})", starts="(", ends=")"),
)
STYLES = (
    Wish(
        "Be polite and begin with Certainly.",
        lambda task, label: f"Certainly, {_lower(sentence(task, label))}",
        form="sentence",
        starts="Certainly",
    ),
    Wish(
        "End with over, as on the radio.",
        lambda task, label: sentence(task, label).removesuffix(".") + ", over.",
        form="sentence",
        ends="over",
    ),
)
LANGUAGES = tuple(map(_in_language, _TRANSLATIONS))
