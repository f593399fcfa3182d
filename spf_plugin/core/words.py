"""The small words around a target, by what they do: English, French, Russian, and of German, Spanish, Italian,
Portuguese and Dutch the most common; patterns for scripts without spaces.

Lists, and no grammar: a word that is in none of them counts as a noun, which stays. All in lower case, NFC, with `'`.
"""

from __future__ import annotations

import re


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _units(text: str) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(unit.split()) for unit in text.split("|"))


DETERMINERS = _set(
    "a an the her his their its my your our no some any two three four several many both each this these those un "
    "une le la les l' du des son sa ses leur leurs deux trois ein eine einen einem einer der das dem seine seinem "
    "seiner ihre ihrem ihrer el los las una unos unas su sus il lo gli uno um uma seu sua een het zijn haar"
)
POSSESSIVES = _set("her his their its my your our")
MEASURES = _set("pair pairs set sets piece pieces couple bunch lot lots kind type paire")
OF = _set("of de d' di von")
STYLES = _set("style aesthetic manner")
AND = _set("and plus or nor & + et ou и или а und oder y e ed")
PREPOSITIONS = _set(
    "with w/ without in on at by against under underneath beneath below above over behind beside besides near from "
    "into onto through among amid between around across along past toward towards inside outside within off to "
    "during before after beyond opposite like for as avec sans en à au aux dans sur sous contre devant derrière près "
    "chez vers pendant parmi entre с со в во на под над у возле около перед за из из-за к ко от без для при среди "
    "между через вдоль мимо о об mit ohne im am vor neben unter auf con sin sobre entre senza nel nella sul sulla com "
    "sem na zonder met op"
)
#: Of these, the ones that say where somebody is.
WHERE = _set("in on at by against under underneath beneath behind beside near inside outside among between")
#: Of several words, which go or stay as one.
PREPOSITION_UNITS = _units(
    "next to|in the style of|in the form of|in the shape of|in front of|on top of|in the middle of|"
    "close to|out of|ahead of|along with|together with|instead of|"
    "to the left of|to the right of|à côté de|à côté d'|au milieu de|en face de|près de|près d'|"
    "рядом с|рядом со|вместе с|на фоне|в центре"
)
#: Verbs that say nothing without their object; any other "...ing" counts too.
VERBS = _set(
    "wears wear wore has have had holds hold held carries carry carried sports rides plays reads eats drinks uses "
    "shows features includes porte portant tient tenant ayant arborant держит держащий держащая носит носящая имеет "
    "надел надела несёт несет trägt hält lleva llevando tiene tienen sostiene indossa indossando usando "
    "vestindo segurando draagt"
)
VERB_UNITS = _units(
    "dressed in|dressed as|disguised as|clad in|dressed up in|covered in|covered with|covered by|filled with|full of|"
    "made of|surrounded by|"
    "adorned with|decorated with|equipped with|armed with|coiffé de|coiffé d'|coiffée de|coiffée d'|vêtu de|vêtu d'|"
    "vêtue de|vêtue d'|vêtu en|vêtue en|habillé en|habillée en|"
    "lleva puesta|lleva puesto|lleva puestas|lleva puestos|"
    "держит в руках|держит в руке|держит на руках|одетый в|одетая в|одет в|одета в"
)
INTRANSITIVE = _set(
    "smiling laughing standing sitting walking running looking posing sleeping dancing crying jumping talking lying "
    "kneeling grinning frowning screaming leaning resting swimming staring gazing"
)
#: Participles that are verbs also where no article follows; of the others "-ing" may describe ("piercing blue eyes").
TRANSITIVE = _set(
    "wearing holding carrying riding playing eating reading drinking using hugging having showing making taking"
)
#: These end in "ing" and are nouns (or prepositions).
NO_VERBS = _set(
    "ring earring king thing building ceiling painting wedding evening morning clothing string wing spring "
    "lightning lighting nothing something anything everything stocking drawing during sling sterling viking darling "
    "being dining living flooring legging parking"
)
AUXILIARIES = _set("is are was were be been being isn't aren't 's 're est sont был была")
ADVERBS = _set("also currently just both only still always now very really so quite très очень")
RELATIVES = _set("who that which whom qui который которая которое которые")
WHILE = _set("while as when where because but then if although comme tandis пока когда но")
#: What else cannot be the noun that a target describes: a verb, an adverb or a pronoun begins something of its own.
BEGINS = _set(
    "stands sits stood sat seated standing walks walking looks smiles laughs poses lies lay lays leans rests runs "
    "sleeps waits kneels plays outdoors indoors alone together there here today up down away assis assise debout "
    "souriant souriante whose marche sourit regarde dort стоит сидит идёт идет лежит смотрит "
    "sitzt steht geht läuft liegt lacht lächelt schaut blickt schläft tanzt springt lehnt posiert trinkt liest spielt "
    "sonríe ríe mira camina corre juega baila duerme espera sorride cammina guarda legge"
)
POSED = _set("assis assise debout souriant souriante sentado sentada")
PRONOUNS = _set("i you he she it we they there il elle ils elles on он она оно они")
PERSONS = _set(
    "man woman men women boy girl boys girls person people lady ladies guy child children kid kids couple homme femme "
    "bride groom"
)
#: Words that alone say nothing, where all else of a clause went with the target.
FILLERS = DETERMINERS | AND | AUXILIARIES | ADVERBS | RELATIVES | WHILE | PRONOUNS - {"on"} | {"one", "of", "them"}

# What describes a thing and stands before it. Only between a target and the words that introduce it.
ADJECTIVES = _set(
    "platinum copper bronze peach mint coral charcoal "
    "navy teal maroon turquoise cyan magenta cream khaki olive violet lavender scarlet crimson ivory burgundy auburn "
    "red orange yellow green blue purple pink brown black white grey gray golden gold silver blonde blond brunette "
    "beige dark light bright pale colorful colourful big large small little tiny huge long short medium wide narrow "
    "tall thick thin curly wavy straight messy fluffy fuzzy shiny soft old new vintage modern young beautiful "
    "pretty cute elegant lovely nice simple plain fancy leather wool woolen woollen silk cotton straw lace denim "
    "velvet metal wooden knitted striped plaid checkered dotted floral patterned transparent open closed round "
    "square single matching full heavy grand grande petit petite long longue beau belle joli jolie vieux vieille"
)
_GERMAN = "(?:lang|kurz|blond|rot|blau|grün|schwarz|weiß|braun|grau|gelb|groß|klein|dick|dünn|neu|schön|bunt)e[nmrs]?"
_ADJECTIVE = re.compile(
    rf"{_GERMAN}|"
    r"(?:long|court|grand|petit|beau|belle|vieille|joli|jolie|longue|courte|grande|petite)s|"
    r"\w+-\w+|\w+ish|\w{3,}(?:ful|ed)|[а-яё]{3,}(?:ый|ий|ой|ая|яя|ое|ее|ые|ие|ую|юю|ым|им|ых|их|ыми|ими|ом)"
)
#: What describes a thing and stands behind it.
BEHIND = re.compile(
    r"(?:roj|negr|blanc|amarill|rubi|ross|ner|bianc)[oaie]s?|azul(?:es)?|verdes?|blonds|"
    r"(?:roug|jaun)es?|(?:noir|bleu|vert|gris|brun)e?s?|blanc(?:he)?s?|(?:viol|ros|beig|long)e?u?e?s?"
)
#: Participles that tell of a garment or of hair, and not of who wears it.
OF_THINGS = _set(
    "made worn tied draped pulled styled braided parted swept flowing blowing cascading falling hanging framing "
    "covering crossed reaching loose fastened perched wrapped slung strapped hung dangling tucked pinned clipped"
)
PLACES = _set("around on over in across behind under above between down en")
BODY = _set(
    "head neck face shoulder shoulders waist wrist wrists hair ear ears hand hands arm arms lap back eyes nose "
    "chest mouth finger fingers forehead leg legs foot feet hips body "
    "brazo mano cabeza cuello cara kopf hals tête cou "
    "teeth cheek cheeks eye eyebrow eyebrows lip lips brow chin thigh thighs knee knees ankle ankles throat"
)
SIDES = _set("left right upper lower izquierdo izquierda derecho derecha gauche droite")
#: What means "has" only before a word of its language.
HAS = {
    "hat": re.compile(f"eine?[nmr]?|{_GERMAN}"),
    "a": re.compile("une?|des?|d'|les?"),
}
#: What a participle of a thing takes with it: "pulled low".
DIRECTIONS = _set("low high back up down tight off open apart")


def is_adjective(word: str) -> bool:
    return word in ADJECTIVES or bool(_ADJECTIVE.fullmatch(word))


# -- scripts without spaces: what stands directly beside the target --------------------------------------------------

_ZH_COLOUR = "(?:[红蓝绿黄白黑灰粉紫棕金银橙][色]?的?|[大小长短]的?|长长的|漂亮的|美丽的)"
_ZH_MEASURE = "(?:[一两二三几]?[顶条件副个把只双头朵束位杯本辆套支])"
#: Chinese "wears a", with what describes the thing; a measure word alone counts only where nothing follows.
ZH_VERB = re.compile(
    "(?:正在|正)?(?:头戴|佩戴|身穿|身着|手持|手拿|没有|[戴穿拿握抱背系围披带留撑打骑有])(?:着|了)?"
    f"(?:{_ZH_MEASURE}(?:[\u4e00-\u9fff]{{2}}的)?)?{_ZH_COLOUR}{{0,3}}$"
)
ZH_MEASURE = re.compile(f"{_ZH_MEASURE}{_ZH_COLOUR}{{0,3}}$")
ZH_AT, ZH_PLACE = re.compile("[站坐躺靠走]?着?在$"), re.compile("前面?|上面?|里面?|中|旁边?|下面?|后面?")
ZH_OF = re.compile("的")
#: Japanese "wearing", behind the thing; and what describes it before.
JA_VERB = re.compile(
    "[をがの](?:身につけ|身に着け|着用し|かぶっ|被っ|着|かけ|掛け|つけ|付け|し|持っ|もっ|履い|はい|巻い|羽織っ|さし|差し)"
    "(?:ている|ていた|た|て)|[をがの](?:持つ|着る|かぶる|被る|かける|つける|する|さす|ある)"
    "|を[\u4e00-\u9fff]{1,2}[ぁ-ん]{0,3}?(?:[てで]いる|ながら|[むるうくぐすつぶただてで])(?![ぁ-ん])"
)
JA_OF = re.compile("姿?の|姿")
JA_ADJECTIVE = re.compile(
    "(?:(?:赤|青|黒|白|黄色|茶色|長|短|大き|小さ|新し|古)[いなの])*(?:[\u4e00-\u9fff]+(?:わら)?|[ァ-ヶー]+)?$"
)
#: Korean: particle and verb behind the thing; and what describes it before.
KO_VERB = re.compile(
    r"(?:을|를|이|가)?\s{0,2}(?:쓰고 있는|입고 있는|들고 있는|끼고 있는|하고 있는|착용한|착용하고|쓴|쓰고|"
    r"입은|입고|든|들고|낀|끼고|가진|두른|두르고|멘|메고|신은|신고|한|하고|있는)(?=\s)"
)
KO_OF = re.compile("의")
KO_ADJECTIVE = re.compile(r"(?:(?:빨간|파란|노란|검은|하얀|흰|긴|짧은|큰|작은)\s{1,2})+$")
UNSPACED_AND_BEHIND = re.compile("和|与|跟|以及|及|还有|と|や|(?:와|과)(?=\\s)")
UNSPACED_AND_BEFORE = re.compile(r"(?:和|与|跟|以及|及|还有|と|や|(?:와|과)\s{1,2})$")
