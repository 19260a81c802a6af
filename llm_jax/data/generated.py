r"""Corpora that need no file: `QUESTION\tANSWER` documents, drawn the same on every machine.

    builtin:numbers     vierhundertzwölf     four hundred and twelve     German number words, translated
    builtin:brackets    ([]{<>})             yes                         whether every bracket is matched

The answers can be checked without a model, and a model of a few hundred thousand parameters learns them.
"""

import random
from collections.abc import Callable, Iterator

UNITS = {
    "german": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf "
    "dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn",
    "english": "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
}
TENS = {
    "german": "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    "english": "- - twenty thirty forty fifty sixty seventy eighty ninety",
}
UNITS = {language: words.split() for language, words in UNITS.items()}
TENS = {language: words.split() for language, words in TENS.items()}

NUMBERS = 10_000
TEXTS, PAIRS = 60_000, (4, 8)
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def numbers() -> Iterator[str]:
    """Return every number below ten thousand."""
    return (f"{german(n)}\t{english(n)}" for n in range(NUMBERS))


def german(n: int) -> str:
    """Return the German word for `n`, 0 to 999,999; the unit comes before the tens: 21 is `einundzwanzig`."""
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if n >= size:
            count, rest = divmod(n, size)
            return german(count).removesuffix("s" * (count % 100 == 1)) + name + (german(rest) if rest else "")
    if n < 20:
        return UNITS["german"][n]
    tens, unit = divmod(n, 10)
    unit_first = f"{UNITS['german'][unit].removesuffix('s' * (unit == 1))}und" if unit else ""
    return unit_first + TENS["german"][tens]


def english(n: int) -> str:
    """Return the English words for `n`, 0 to 999,999: `twelve thousand three hundred and forty-five`."""
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if n >= size:
            count, rest = divmod(n, size)
            joined = " and " if rest < 100 else " "
            return f"{english(count)} {name}" + (joined + english(rest) if rest else "")
    if n < 20:
        return UNITS["english"][n]
    tens, unit = divmod(n, 10)
    return TENS["english"][tens] + (f"-{UNITS['english'][unit]}" if unit else "")


def brackets() -> Iterator[str]:
    """Yield a balanced text, then the same with two brackets swapped: neither length nor counts tell which."""
    draw, seen = random.Random(0).random, set()  # the only method of `random` that is promised not to change
    while len(seen) < TEXTS:
        text = unbalanced = nested(PAIRS[0] + below(draw, PAIRS[1] - PAIRS[0] + 1), draw)
        while balanced(unbalanced):
            unbalanced = swapped(text, draw)
        if not seen & {text, unbalanced}:
            seen |= {text, unbalanced}
            yield f"{text}\tyes"
            yield f"{unbalanced}\tno"


def nested(pairs: int, draw: Callable[[], float]) -> str:
    """Draw a balanced text: at each position a bracket opens or the innermost closes, while both are possible."""
    text, waiting = "", ""
    for left in range(2 * pairs, 0, -1):
        if waiting and (len(waiting) == left or draw() < 0.5):
            text, waiting = text + waiting[-1], waiting[:-1]
        else:
            opening = "".join(CLOSING)[below(draw, len(CLOSING))]
            text, waiting = text + opening, waiting + CLOSING[opening]
    return text


def swapped(text: str, draw: Callable[[], float]) -> str:
    """Return `text` with two of its characters swapped."""
    i, j = sorted((below(draw, len(text)), below(draw, len(text))))
    return text[:i] + text[j] + text[i + 1 : j] + text[i] + text[j + 1 :] if i < j else text


def balanced(text: str) -> bool:
    """Return whether every bracket is closed by its own kind, the innermost first."""
    waiting: list[str] = []
    for bracket in text:
        if bracket in CLOSING:
            waiting.append(CLOSING[bracket])
        elif not waiting or waiting.pop() != bracket:
            return False
    return not waiting


def below(draw: Callable[[], float], n: int) -> int:
    """Draw a number from 0 to n - 1."""
    return int(draw() * n)


GENERATED: dict[str, Callable[[], Iterator[str]]] = {"builtin:numbers": numbers, "builtin:brackets": brackets}
