"""Words that RULER's tasks hide, count and ask for, as many as any length needs, offline.

Guarantees: no word of one or of two parts stands inside another such word, so that one does not count for
the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator


def words(text: str) -> list[str]:
    """A list to read: its words."""
    return text.split()


ADJECTIVES = words("""
    agile amber ancient blue bold brave brief bright calm careful clever cloudy cold cool crisp curious
    damp dark deep dense distant dry early eager empty equal even faint famous fast fierce firm flat fresh
    frosty gentle glad golden grand green happy harsh heavy hollow honest huge humble idle jolly keen kind
    large lazy lean light lively lofty lonely lucky mellow merry mild modest narrow neat noble odd pale plain
    proud quick quiet rapid rare red ripe rough royal rusty sharp shy silent silver simple slow smooth soft
    solid steady stern strange strong sunny sweet swift tall tender thick tidy tiny vast vivid warm wild wise
""")
NOUNS = words("""
    acorn actor anchor apple artist autumn badge bakery basket beacon bell bicycle blanket bottle bridge brush
    bucket butter button cabin camera candle canyon captain carpet castle cellar chapel cherry circus cliff
    clock cousin cradle dancer desert doctor dolphin dragon drawer eagle engine falcon farmer feather fiddle
    finger forest fountain garden garlic ghost giant glacier guitar hammer harbor helmet hill honey hunter
    island jacket jewel judge kettle kitchen ladder lantern lemon letter lizard locket magnet maple market
    meadow mirror monkey morning mountain museum napkin needle nephew ocean office orchard oven painter palace
    parrot pepper piano pillow pirate planet pocket poet potato puzzle quarry rabbit ribbon river rocket
    saddle sailor school shadow shepherd shovel singer spider spoon station stone summer table temple
    thunder ticket tiger tower tunnel turtle valley velvet village violin wagon wallet walnut weaver
    whistle window winter
    wizard zebra
""")
PLAIN = ADJECTIVES + NOUNS


def pairs(random: random.Random) -> Iterator[str]:
    """Different words of two parts ("amber-river"), in random order; of three, when they run out."""
    for parts in ((ADJECTIVES, NOUNS), (ADJECTIVES, ADJECTIVES, NOUNS)):
        joined = ["-".join(word) for word in itertools.product(*parts)]
        random.shuffle(joined)
        yield from joined


def distinct_words(count: int, random: random.Random) -> list[str]:
    """So many different words: plain ones while they suffice, else all of them of two parts and more."""
    return random.sample(PLAIN, count) if count <= len(PLAIN) else long_words(count, random)


def long_words(count: int, random: random.Random) -> list[str]:
    """So many different words of two parts and more."""
    return list(itertools.islice(pairs(random), count))


def coded_words(random: random.Random) -> Iterator[str]:
    """Endless different words that mean nothing, six letters each."""
    used = set()
    while True:
        word = "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(3))
        if word not in used:
            used.add(word)
            yield word
