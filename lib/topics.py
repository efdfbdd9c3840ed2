"""A generated corpus with known topics: documents of one main topic, a little of another, and common words.

The words of a topic and the common words are in the order of their frequency; a word may be in several topics.
"""
from itertools import accumulate

import numpy as np

TOPICS = {
    "astronomy": """star planet telescope moon orbit galaxy light sky sun comet observer mass shell core cluster lens
        mirror crater eclipse spectrum dust dwarf gravity nebula probe satellite rocket distance magnitude horizon
        dark ring meteor axis asteroid cosmic dome eyepiece launch radiation hydrogen helium universe constellation
        stellar""",
    "cooking": """oven butter flour sauce pan salt onion sugar recipe dish season oil garlic pepper dough bread egg
        cream cheese lemon soup herb plate knife boil roast stir bake spice rice meat fish tomato potato vinegar port
        shell scale bowl pastry simmer grill parsley thyme wine""",
    "gardening": """soil plant seed root leaf bed flower water compost weed prune bulb spade season shade tomato rose
        hedge lawn pot bloom shrub branch bark mulch frost greenhouse herb tree moss slug rake border stem sow dig
        potato onion bee fertiliser orchard graft ivy tulip light""",
    "music": """note key piano song string violin chord band bass tune scale pitch concert organ bow rhythm melody
        choir drum orchestra guitar flute opera score composer record harmony singer quartet trumpet tempo stage
        sonata cello album horn dance lyric voice symphony conductor mode sharp flat tenor""",
    "sailing": """wind boat sail crew mast tide harbour deck port anchor bow hull keel rudder rope wave sea race knot
        course storm coast captain cabin chart buoy compass horizon star breeze helm dinghy yacht stern regatta island
        shore ferry starboard lee reef jib net mooring swell""",
    "medicine": """patient doctor dose disease blood drug heart pain cell trial virus treatment hospital symptom organ
        nurse infection surgery vaccine tissue fever lung skin liver diagnosis clinic tumour therapy pulse nerve bone
        kidney stomach operation culture allergy tablet cough immune chronic diet pressure relief brain wound""",
    "football": """goal match team ball player coach season pitch league keeper score referee net striker penalty
        crowd foul corner cup club stadium tackle defence pass midfield kick captain header shirt bench draw fan win
        trophy transfer whistle injury squad rival offside half title manager attack save""",
    "computing": """file program disk memory key window server network code virus driver screen software mouse port
        printer user data keyboard card system bug shell password graphics chip version backup compiler string
        processor cable table record monitor folder script cluster modem font pixel host mode cache column"""}
COMMON = """the of to and a in is that it for was on with as be at this by from are have not or but an they you one
    had all we there their which can if were has been would so when what more will out about up who them some then
    into only other could time than very no do any like just over also know people after first how its two good way
    new because our well even most many much make see here where too such these those before get made long work little
    back same each never last use own still another year day right great while old every again think take under found
    between always both might part off during must small few without place around went left thing come however against
    often though end once set number until being given away going water large look best need ask why find put next
    told hand better since house almost point several early nothing enough later half keep turn done seem open close
    quite really rather perhaps today bit try start line week home night head side kind question reason problem answer
    help show letter reader sure whole group further matter word read write sent post article wrote anyone else
    someone thanks idea case fact true mean believe example heard advice useful simple course certain clear change
    common list month price order address member offer state city town street road building room door family friend
    child school story book paper picture page office business company job money hour minute second evening morning
    summer winter spring support public information service free special local general possible available different
    important""".split()
SUBJECTS = 3


def vocabulary() -> tuple[str, ...]:
    """The words of the common list and of all topics, each once, in this order."""
    return tuple(dict.fromkeys([*COMMON, *(word for words in TOPICS.values() for word in words.split())]))


def draw(n: int, seed: int) -> tuple[list[list[str]], list[int]]:
    """n documents as lists of words in the drawn order, and their main topics (0 to 7, in turn).

    A document has 25 to 250 words (density falling with the length squared), a third to two thirds of them common; of
    the others, 60 to 95 % are of its main topic and the rest of another one. Each topic has three subjects: every
    third word of its list is four times as frequent in a document on the subject. Uniform numbers and exactly rounded
    arithmetic only, so that the corpus is the same on every machine.
    """
    rng = np.random.default_rng(seed)
    lists = [words.split() for words in TOPICS.values()]
    labels = [i % len(lists) for i in range(n)]
    return [_document(rng, lists, main) for main in labels], labels


def _document(rng, lists: list[list[str]], main: int) -> list[str]:
    u = rng.random(5)
    other = (main + 1 + int(u[0] * (len(lists) - 1))) % len(lists)
    common, own, length = (1 + u[1]) / 3, 0.6 + 0.35 * u[2], int(25 / (1 - 0.9 * u[3]))
    kinds = _pick([common, (1 - common) * own, (1 - common) * (1 - own)], rng.random(length))
    words = [[source[k] for k in _pick(_weights(len(source), subject), rng.random(length))] for source, subject in
             ((COMMON, None), (lists[main], int(u[4] * SUBJECTS)), (lists[other], None))]
    return [words[kind][i] for i, kind in enumerate(kinds)]


def _weights(n: int, subject: int | None) -> list[float]:
    """Falling with the rank; four times as large for the words of the subject."""
    return [(4 if rank % SUBJECTS == subject else 1) / (rank + 4) for rank in range(n)]


def _pick(weights: list[float], u: np.ndarray) -> list[int]:
    """Indices drawn in proportion to the weights, by uniform numbers u."""
    edges = list(accumulate(weights))
    return np.searchsorted(edges, u * edges[-1], side="right").tolist()
