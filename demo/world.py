"""A small invented world, told twice: as prose to pre-train on, as conversations to fine-tune on.

`documents` tells the world's facts and shows the skills (adding, sorting, rewriting, referring back)
in running prose. `conversations` asks for the same facts and skills, and words its answers otherwise,
so that a model pre-trained on the prose knows the matter but not the manner.
"""

import random
import re

NAMES = (
    "Abel Adra Bero Bessa Calla Corin Dagny Dorrit Edda Elric Fenn Filo Gerda Goran Hale Hetta Ilka Ivo Jarla "
    "Joss Kell Kirra Lano Lisbet Marn Mirel Nadja Nels Odo Orla Perrin Petra Quill Rosk Runa Sanna Sorrel Tavi "
    "Tilda Udo Ursa Vanna Viggo Wenna Wolf Yara Yorick Zelda"
).split()
SURNAMES = (
    "Ashdown Barrow Birch Calder Cobb Dunmore Eldwick Farrow Finch Garth Gorse Hallow Holt Jessop Kettle Lark "
    "Ludd Marsh Moss Nettle Oakes Penn Pike Quarry Reed Rook Sedge Slate Stark Tarn Thorn Underhill Vale Wick "
    "Winter Wren Yarrow Yewell"
).split()
TOWNS = (
    "Aldermoor Brackwater Cresthaven Dunwold Eastmere Fallowby Greyford Hollin Ironbeck Juniper Kestrel Larkham "
    "Millrace Northolt Oxley Pebblecombe Ravensby Saltwick Thistledown Wetherby"
).split()
RIVERS = "Ambra Borrin Cald Dovey Esk Fleet Gannel Humble Lorn Mede".split()
MOUNTAINS = "Mount Brand,Mount Cairn,Mount Durrow,Mount Fell,Mount Hoar,Mount Storr".split(",")
LAKES = "Lake Amber,Lake Bramble,Lake Crane,Lake Dusk,Lake Mirror,Lake Silver".split(",")
GOODS = (
    "candles cheese bells honey paper glass carpets pears clocks salt kites soap lanterns mustard ribbons "
    "violins bricks cider gloves maps"
).split()
COLOURS = "red blue green white black yellow brown grey purple golden".split()
CRAFTS = {  # who: what the craft makes, from what, with what
    "baker": ("bread", "flour", "paddle"),
    "potter": ("bowls", "clay", "wheel"),
    "weaver": ("cloth", "wool", "loom"),
    "smith": ("horseshoes", "iron", "hammer"),
    "carver": ("spoons", "wood", "knife"),
    "cobbler": ("boots", "leather", "needle"),
    "mason": ("walls", "stone", "chisel"),
    "brewer": ("beer", "barley", "kettle"),
    "cooper": ("barrels", "planks", "plane"),
    "thatcher": ("roofs", "straw", "rake"),
    "hatter": ("hats", "felt", "mould"),
    "jeweller": ("rings", "silver", "file"),
    "tailor": ("coats", "linen", "shears"),
    "basketmaker": ("baskets", "willow", "bodkin"),
    "glazier": ("windows", "sand", "pipe"),
    "ropemaker": ("ropes", "hemp", "winch"),
}
ANIMALS = {  # which: its colour, its food, its bed
    "snowl": ("white", "mice", "in the barn"),
    "brindlefox": ("brown", "eggs", "under the hedge"),
    "marlet": ("grey", "berries", "on the roof"),
    "tufthare": ("golden", "clover", "in tall grass"),
    "gloamcat": ("black", "fish", "by the fire"),
    "pondling": ("green", "worms", "among the reeds"),
    "mossbear": ("green", "roots", "in a hollow tree"),
    "rookling": ("purple", "seeds", "in the bell tower"),
    "dapplegoat": ("white", "bark", "behind the mill"),
    "sandmole": ("yellow", "beetles", "below the path"),
    "quillhog": ("brown", "apples", "in dry leaves"),
    "lantern moth": ("blue", "nectar", "inside a bell flower"),
    "reedotter": ("grey", "crabs", "under the bridge"),
    "hill pony": ("red", "hay", "in the stable"),
}
THINGS = (
    "apples bells buttons candles chairs coins cups drums eggs feathers flutes hats jars keys kites lamps "
    "marbles nails needles nuts onions oranges pears pens pipes plates plums pots ribbons rings ropes shells spoons "
    "stamps stones tiles turnips"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
BAGS = "basket sack chest crate barrel bucket".split()
PLACES = "near the mill,behind the inn,beside the well,under the oak,at the gate,on the hill,in the yard,by the bridge".split(
    ","
)
TIMES = "at dawn,at noon,before supper,after the storm,on market day,in the first snow".split(",")
DEEDS = "painted mended washed lifted carried cleaned dropped lowered moved sold".split()
OBJECTS = "cart ladder table drum lamp boat door bench kettle saddle mirror trunk".split()
MOODS = "clever/smart quick/swift glad/happy silent/quiet rich/wealthy brave/bold tired/weary".split()
LOOKS = "big/large small/little pretty/lovely strong/sturdy dirty/filthy wet/soaked".split()
DEALINGS = "built/constructed found/discovered took/grabbed fixed/repaired wanted/desired liked/enjoyed bought/purchased".split()

# Facts. Each kind: the prose that states it, the ways to ask for it, the one way to answer.
PERSON_PROSE = [
    "{name} has a house in {town}.",
    "The home of {name} is in {town}.",
    "{town} is where {name} was born and still has a bed.",
    "{name} of {town} is a {craft}.",
    "Most mornings {name} can be seen in the streets of {town}.",
    "The {craft} called {name} is well liked.",
    "Whoever needs {product} goes to {name} the {craft}.",
    "{name} learned to be a {craft} as a child.",
    "The work of {name} is that of a {craft}.",
    "A {animal} follows {name} everywhere.",
    "{name} shares the house with a {animal}.",
    "The animal that {name} looks after is a {animal}.",
    "{name} has had a {animal} for years.",
    "Among those who dwell in {town} is {name} with a {animal}.",
    "One {craft} in {town} is {name}.",
    "A traveller asked about {name} and heard of a {craft} in {town}.",
    "Ask for {name} in {town} and someone will show the way to the {craft}.",
    "Nobody in {town} has to ask which house {name} lives in.",
    "What {name} does for a living is no secret: the trade is that of a {craft}.",
    "People tell many stories of {name}, and each has a {animal} in it.",
    "How does {name} earn so much money? There are too few who make {product}.",
]
TOWN_PROSE = [
    "{town} lies where the {river} bends.",
    "The {river} runs past {town}.",
    "Boats on the {river} stop at {town}.",
    "The roofs of {town} are painted {colour}.",
    "A {colour} roof covers every house in {town}.",
    "The best {goods} come from {town}.",
    "Traders go to {town} to buy {goods}.",
    "{town} sells more {goods} than any other town.",
    "What {town} is famous for can be found in every shop there: {goods}.",
    "A guest of {town} will soon find out that its river is the {river}.",
]
RIVER_PROSE = [
    "The {river} starts as a spring on {mountain}.",
    "Snow from {mountain} feeds the {river}.",
    "The water of the {river} ends up in {lake}.",
    "{lake} is filled by the {river}.",
    "Whoever follows the course of the {river} from {mountain} will come to {lake}.",
]
ANIMAL_PROSE = [
    "The {animal} has a {colour} coat.",
    "A {animal} is easy to tell by its {colour} coat.",
    "Nothing pleases a {animal} more than {food}.",
    "The {animal} goes looking for {food}.",
    "At night the {animal} lies down {bed}.",
    "A {animal} makes its bed {bed}.",
    "What does a {animal} dream of? Surely of {food}.",
    "Where the {animal} sleeps, which is {bed}, few would look for it.",
]
CRAFT_PROSE = [
    "Out of {material} a {craft} gets {product}.",
    "The {craft} turns {material} into {product}.",
    "No {craft} goes far without a {tool}.",
    "The {tool} is what a {craft} holds all day.",
    "For {product} people need a {craft}.",
    "What a {craft} works with is mostly a {tool}.",
    "Many describe a {craft} as somebody who smells of {material}.",
]
FACTS = {
    "person": [
        (
            [
                "Where does {name} live?",
                "In which town does {name} live?",
                "Which town is the home of {name}?",
                "Tell me where {name} lives.",
                "I would like to visit {name}. Which town should I go to?",
            ],
            "{name} lives in {town} and works there as a {craft}.",
        ),
        (
            [
                "What is the trade of {name}?",
                "What does {name} do for a living?",
                "Which craft does {name} work at?",
                "Tell me what work {name} does.",
                "How does {name} earn money?",
            ],
            "By trade {name} is a {craft}, making {product} from {material}.",
        ),
        (
            [
                "Which animal does {name} keep?",
                "What kind of animal lives with {name}?",
                "Tell me which animal {name} has.",
                "Does {name} have an animal, and which?",
                "Name the animal of {name}.",
            ],
            "{name} keeps a {animal}, a {animal_colour} animal that feeds on {food}.",
        ),
    ],
    "town": [
        (
            [
                "Which river flows by {town}?",
                "On which river does {town} stand?",
                "Tell me the river of {town}.",
                "What river would I find in {town}?",
            ],
            "{town} stands on the river {river}, which flows down to {lake}.",
        ),
        (
            [
                "What is {town} known for?",
                "What should I buy in {town}?",
                "Tell me what {town} is famous for.",
                "Describe the town of {town}.",
            ],
            "{town} is famous for its {goods} and has {colour} roofs.",
        ),
    ],
    "river": [
        (
            [
                "Where does the {river} rise?",
                "Describe the course of the {river}.",
                "Where does the {river} flow?",
                "Tell me about the river {river}.",
            ],
            "The river {river} rises on {mountain} and flows down to {lake}.",
        ),
    ],
    "animal": [
        (
            [
                "What does a {animal} eat?",
                "Describe the {animal}.",
                "Where does a {animal} sleep?",
                "Tell me about the {animal}.",
                "What is a {animal} like?",
            ],
            "A {animal} is a {colour} animal that feeds on {food} and sleeps {bed}.",
        ),
    ],
    "craft": [
        (
            [
                "What does a {craft} make?",
                "Which tool does a {craft} use?",
                "Describe the craft of a {craft}.",
                "Tell me about the work of a {craft}.",
                "What does a {craft} work with?",
            ],
            "A {craft} uses a {tool} and makes {product} from {material}.",
        ),
    ],
}

# Sums, as SUMS[kind]: prose, ways to ask, answer; {c} is the result of {a} and {b}.
SUMS = {
    "plus": (
        [
            "{a} {things} and {b} {things} are {c} {things}.",
            "{who} had {a} {things} and got {b} more, which made {c}.",
            "To {a} {things} {who} added {b} and counted {c}.",
            "{a} plus {b} is {c}.",
            "Add {a} to {b} and the total is {c}.",
            "{who} was asked how many {things} there were now, {a} here and {b} there, and said {c}.",
        ],
        [
            "{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?",
            "If {who} owns {a} {things} and finds {b} others, how many is that?",
            "Add {b} {things} to the {a} {things} of {who}. What is the total?",
            "There are {a} {things} with {who}, then {b} more arrive. Count the {things}.",
        ],
        "{who} now has {c} {things}, because {a} plus {b} is {c}.",
    ),
    "minus": (
        [
            "{who} had {a} {things} and sold {b}, so {c} were left.",
            "Of {a} {things} {b} were lost and {c} remained.",
            "{a} minus {b} is {c}.",
            "Take {b} {things} from {a} {things} and {c} remain.",
            "{who} was asked how many {things} were left over when {a} became fewer by {b}, and said {c}.",
        ],
        [
            "{who} has {a} {things} and gives away {b}. How many {things} are left?",
            "Out of {a} {things} {who} sells {b}. How many remain?",
            "Take {b} from the {a} {things} of {who}. What is left over?",
            "{who} had {a} {things} but lost {b}. Count what is left.",
        ],
        "{who} still has {c} {things}, because {a} minus {b} is {c}.",
    ),
    "times": (
        [
            "{a} boxes with {b} {things} each hold {c} {things}.",
            "{a} times {b} is {c}.",
            "{who} filled {a} boxes with {b} {things} each and used {c}.",
            "To fill each of the {a} boxes with {b} {things}, {who} would need {c}.",
        ],
        [
            "{who} fills {a} boxes with {b} {things} each. How many {things} is that?",
            "How many {things} does {who} need to put {b} in each of {a} boxes?",
            "Each of the {a} boxes of {who} holds {b} {things}. What is the total?",
        ],
        "{who} needs {c} {things} for this, because {a} times {b} is {c}.",
    ),
}

# Sorting, as SORTS[kind]: prose, ways to ask, answer.
SORTS = {
    "words": (
        [
            "Laid out by the alphabet, {mixed} become {sorted}.",
            "The alphabet puts {mixed} in the order {sorted}.",
            "Asked to sort the words {mixed}, the children wrote {sorted}.",
        ],
        [
            "Sort these words by the alphabet:",
            "Put the words in alphabetical order:",
            "Order this list from A to Z:",
            "Arrange these words alphabetically:",
        ],
        "In their right order the words are {sorted}.",
    ),
    "numbers": (
        [
            "The numbers {mixed} go from low to high as {sorted}.",
            "Counting upwards through {mixed} gives {sorted}.",
            "Asked to arrange these by size, {mixed}, the children wrote {sorted}.",
        ],
        [
            "Sort these numbers:",
            "Put the numbers in rising order:",
            "Order these numbers from low to high:",
            "Arrange the numbers by size:",
        ],
        "From smallest to largest the numbers are {sorted}.",
    ),
    "names": (
        [
            "{mixed} stood in a row by the alphabet, as {sorted}.",
            "The list of guests, {mixed}, was written out as {sorted}.",
            "People called {mixed} come in this order: {sorted}.",
        ],
        [
            "Sort these people by name:",
            "Put the guests in alphabetical order:",
            "Tell me in which order to call these people:",
            "Arrange these names from A to Z:",
        ],
        "By their names the people come in the order {sorted}.",
    ),
}

# Rewriting, as REWRITES[kind]: the sentence, the sentence rewritten, how prose links them, ways to ask, answer.
REWRITES = {
    "passive": (
        "{when} the {mood} {craft} {deed} the {colour} {object} {place}",
        "the {colour} {object} was {deed} {place} by the {mood} {craft} {when}",
        [
            "Seen from the other side, {new}.",
            "The sentence can be turned round: {new}.",
            "As a passive this would be: {new}.",
        ],
        [
            "Rewrite the sentence in the passive voice:",
            "Turn this into a passive sentence:",
            "Change this to the passive:",
            "Say this in the passive:",
        ],
        "In the passive voice {new}.",
    ),
    "plainly": (
        "the {mood} {craft} {dealing} a {look} {colour} {object} {place}",
        "the {mood2} {craft} {dealing2} a {look2} {colour} {object} {place}",
        [
            "That is to say, {new}.",
            "It means the same that {new}.",
            "Someone else would say it in other words: {new}.",
        ],
        [
            "Rewrite the sentence in other words:",
            "Say the same with different words:",
            "Find other words for this:",
            "Paraphrase this sentence:",
        ],
        "With different words {new}.",
    ),
}

# Reading, as STORIES: sentences, what prose recalls of them later, and (ways to ask, answer) pairs.
STORIES = [
    (
        [
            "On {day} {who} the {craft} went from {town} to {town2} with {n} {things} in a {colour} {bag}.",
            "On the road {who} met {who2}, who had lost a {animal} {place}.",
        ],
        [
            "So it was a {colour} {bag} that {who} had brought to {town2}.",
            "Back in {town}, people asked {who} about the {n} {things}.",
            "{who2} went on looking for the {animal} {place}.",
            "It was {who2} whom {who} had met on the road.",
            "All that was on a {day}.",
        ],
        [
            (
                ["Where did {who} go?", "To which town did {who} travel?"],
                "{who} travelled to {town2} on {day}, coming from {town}.",
            ),
            (
                ["What did {who} carry?", "What was in the {bag}?"],
                "{who} carried {n} {things} in a {colour} {bag}.",
            ),
            (
                ["Whom did {who} meet?", "What happened on the road?"],
                "{who} met {who2}, who was looking for a {animal}.",
            ),
        ],
    ),
    (
        [
            "{who} keeps {n} {things} in a {colour} {bag} {place}.",
            "{who2} the {craft} wants to buy them and offers a {object} from {town}.",
        ],
        [
            "In the end {who2} gave the {object} and got the {things}.",
            "{place2} {who} told of the {colour} {bag}.",
            "The {object} from {town} now belongs to {who}.",
            "After that the {bag} {place} was empty of {things}.",
            "{who2} had {n} {things} then.",
        ],
        [
            (
                ["Where are the {things}?", "Where does {who} keep the {things}?"],
                "The {n} {things} are kept in a {colour} {bag} {place}.",
            ),
            (
                ["What does {who2} offer?", "What would {who} get in return?"],
                "In return {who2} offers {who} a {object} from {town}.",
            ),
            (
                ["Who wants the {things}?", "Who would like to buy something?"],
                "It is {who2} the {craft} who wants to buy the {things}.",
            ),
        ],
    ),
    (
        [
            "At the fair in {town} {who} won a {colour} {object}, and {who2} won {n} {things}.",
            "The judge was {who3}, a {craft} with a {animal}.",
        ],
        [
            "{who} took the {colour} {object} home.",
            "{who3} and the {animal} were seen again in {town}.",
            "With {n} {things} {who2} was pleased too.",
            "{who2} would rather have won the {object}.",
            "They all thanked {who3}, who went back to work as a {craft}.",
        ],
        [
            (
                ["What did {who} win?", "Which prize went to {who}?"],
                "The prize that {who} won in {town} was a {colour} {object}.",
            ),
            (
                ["What did {who2} win?", "Which prize went to {who2}?"],
                "The prize that {who2} won in {town} was {n} {things}.",
            ),
            (
                ["Who was the judge?", "Who gave out the prizes?"],
                "The judge at the fair was {who3}, who is a {craft}.",
            ),
        ],
    ),
]

# Memory, as MEMORIES[topic]: how a speaker says it, how prose reports it, ways to ask for it, how the answer ends.
MEMORIES = {
    "your home": (
        ["I live in {town}.", "My home is in {town}."],
        "came from {town}",
        ["Where do I live?", "Which town is my home?"],
        "you live in {town}",
    ),
    "your animal": (
        ["I keep a {animal}.", "A {animal} lives with me."],
        "had a {animal}",
        ["Which animal do I keep?", "What animal lives with me?"],
        "you keep a {animal}",
    ),
    "your work": (
        ["I work as a {craft}.", "I am a {craft} by trade."],
        "was a {craft}",
        ["What is my trade?", "What work do I do?"],
        "you work as a {craft}",
    ),
    "your friend": (
        ["My best friend is {who2}.", "I am a friend of {who2}."],
        "was a friend of {who2}",
        ["Who is my friend?", "What is my friend called?"],
        "your friend is called {who2}",
    ),
    "your house": (
        ["My door is {colour}.", "My house has a {colour} door."],
        "had a {colour} door",
        ["What colour is my door?", "Which colour did I paint my door?"],
        "your house has a {colour} door",
    ),
    "your things": (
        ["I own {n} {things}.", "I have {n} {things} at home."],
        "owned {n} {things}",
        ["What do I own?", "What do I have at home?"],
        "you own {n} {things}",
    ),
}
CHATTER = [
    "Then they spoke of the weather.",
    "Which colour did the sky have? It was grey, as far as I know.",
    '"Welcome," said a neighbour, "I will remember you."',
    '"Thank you, my friend," called someone.',
    '"Tell me who is there!" called a child.',
    "What would happen next?",
    "They put their things down, because it was late.",
    "The smallest child had the largest voice.",
    "Somebody travelled past, making a different noise.",
    '"You are right," said one of them.',
    '"Your house and my house are alike," said another.',
    "By then the others could see an end of it.",
]
# Loose talk, told in prose only: most words of the world in most places of a sentence.
OPENINGS = [
    "",
    "",
    "",
    "I told you that",
    "You see,",
    "In return",
    "By now",
    "From here",
    "With a different voice",
    "In other words,",
    "It is right that",
    "Thank the judge,",
    "Their friend said that",
    "At the fair",
]
SPEAKERS = "I,you,we,they,people,the others,your friends,my neighbours,the {things}".split(",")
OTHERS = "{who},{who},{who2} of {town},the {craft},the {animal},my friend,your {animal},nobody,the judge,the {bag},this {object},the river".split(
    ","
)
DOINGS = (
    "live/lives work/works sleep/sleeps travel/travels look/looks feed/feeds stand/stands flow/flows rise/rises come/comes "
    "keep/keeps make/makes need/needs want/wants carry/carries hold/holds offer/offers own/owns use/uses like/likes meet/meets "
    "call/calls win/wins tell/tells buy/buys remember/remembers have/has sort/sorts order/orders"
).split()
WHATS = (
    "{n} {things},more {things},a {colour} {object},the {look} {object},the {bag} of {who3},{who3},the right order,the names,these words,"
    "other numbers,a trade,the prize,your home,my house,the largest {object},the smallest {bag},all animals,a {animal},another {craft},"
    "a famous voice,its {colour} roofs,nothing,{n},me,you,who it is,what it was"
).split(",")
WAYS = (
    "in {town},{place},{when},on {day},as a {craft},by trade,in return,from {town2},for this,on nothing,so far,now,too,there,still,"
    "with {who3},by the {object},in a {look} {bag},down to the road,with them,without you"
).split(",")
LINKS = ", because/ because/, and/ and/, which is why/, but/ when/, so/ while/ that/, as".split("/")
SYSTEM = "Answer in one sentence."


WORDS = sorted(
    set(
        re.findall(
            "[A-Za-z]+",
            re.sub(
                "{.*?}",
                " ",
                " ".join(
                    map(
                        str,
                        [
                            NAMES,
                            SURNAMES,
                            TOWNS,
                            RIVERS,
                            GOODS,
                            COLOURS,
                            CRAFTS,
                            ANIMALS,
                            THINGS,
                            DAYS,
                            BAGS,
                            PLACES,
                            TIMES,
                            DEEDS,
                            OBJECTS,
                            MOODS,
                            LOOKS,
                            DEALINGS,
                            FACTS,
                            SUMS,
                            SORTS,
                            REWRITES,
                            STORIES,
                            MEMORIES,
                            CHATTER,
                        ],
                    )
                ),
            ),
        )
    )
)  # what a parrot may have heard


def joined(items):
    return ", ".join(items[:-1]) + " and " + items[-1]


def capital(text):
    return text[0].upper() + text[1:]


def prompt(ask, material):
    """A request that ends in a colon comes before its material, a question after it."""
    return f"{ask} {material}" if ask.endswith(":") else f"{material} {ask}".strip()


class World:
    """The facts, the same for every seed of the telling, and one teller's stream of random choices."""

    def __init__(self, seed, teller):
        self.facts = {"person": [], "town": [], "river": [], "animal": [], "craft": []}
        self._settle(random.Random(seed))
        self.rng = random.Random(f"{seed} {teller}")

    def _settle(self, rng):
        for river in RIVERS:
            self.facts["river"].append(
                dict(river=river, mountain=rng.choice(MOUNTAINS), lake=rng.choice(LAKES))
            )
        for town, goods in zip(TOWNS, rng.sample(GOODS, len(TOWNS)), strict=False):
            self.facts["town"].append(
                dict(rng.choice(self.facts["river"]), town=town, goods=goods, colour=rng.choice(COLOURS))
            )
        for craft, (product, material, tool) in CRAFTS.items():
            self.facts["craft"].append(dict(craft=craft, product=product, material=material, tool=tool))
        for animal, (colour, food, bed) in ANIMALS.items():
            self.facts["animal"].append(dict(animal=animal, colour=colour, food=food, bed=bed))
        couples = [f"{name} {surname}" for name in NAMES for surname in SURNAMES]
        for name in sorted(rng.sample(couples, 96)):
            animal = rng.choice(self.facts["animal"])
            self.facts["person"].append(
                dict(
                    rng.choice(self.facts["craft"]),
                    name=name,
                    town=rng.choice(TOWNS),
                    animal=animal["animal"],
                    animal_colour=animal["colour"],
                    food=animal["food"],
                )
            )

    def details(self):
        """Fresh details for one sum, sentence or story; they hold within it only."""
        pick, two = self.rng.choice, lambda pool: self.rng.sample(pool, 2)
        who, who2, who3 = self.rng.sample(NAMES, 3)
        town, town2 = two(TOWNS)
        place, place2 = two(PLACES)
        (mood, mood2), (look, look2), (dealing, dealing2) = (
            pick(pairs).split("/") for pairs in (MOODS, LOOKS, DEALINGS)
        )
        return dict(
            who=who,
            who2=who2,
            who3=who3,
            town=town,
            town2=town2,
            place=place,
            place2=place2,
            mood=mood,
            mood2=mood2,
            look=look,
            look2=look2,
            dealing=dealing,
            dealing2=dealing2,
            craft=pick(list(CRAFTS)),
            animal=pick(list(ANIMALS)),
            colour=pick(COLOURS),
            things=pick(THINGS),
            bag=pick(BAGS),
            day=pick(DAYS),
            object=pick(OBJECTS),
            deed=pick(DEEDS),
            when=pick(TIMES),
            n=self.rng.randint(2, 40),
        )

    def sum(self):
        kind = self.rng.choice(list(SUMS))
        a, b = self.rng.randint(2, 60), self.rng.randint(2, 39)
        if kind == "minus":
            a += b
        if kind == "times":
            a, b = self.rng.randint(2, 9), self.rng.randint(2, 12)
        c = {"plus": a + b, "minus": a - b, "times": a * b}[kind]
        return SUMS[kind], dict(self.details(), a=a, b=b, c=c)

    def sort(self):
        kind = self.rng.choice(list(SORTS))
        pool = {"words": THINGS, "numbers": range(1, 100), "names": NAMES}[kind]
        mixed = self.rng.sample(pool, self.rng.randint(3, 5))
        while mixed == sorted(mixed):
            self.rng.shuffle(mixed)
        return SORTS[kind], dict(
            mixed=joined([str(item) for item in mixed]), sorted=joined([str(item) for item in sorted(mixed)])
        )

    def rewrite(self):
        old, new, links, asks, answer = self.rng.choice(list(REWRITES.values()))
        details = self.details()
        return (links, asks, answer), dict(
            old=capital(old.format(**details)) + ".", new=new.format(**details)
        )

    # Prose.

    def fact_prose(self):
        kind = self.rng.choices(list(self.facts), [12, 4, 1, 2, 2])[0]
        told = dict(
            person=PERSON_PROSE, town=TOWN_PROSE, river=RIVER_PROSE, animal=ANIMAL_PROSE, craft=CRAFT_PROSE
        )[kind]
        fact = self.rng.choice(self.facts[kind])
        return [text.format(**fact) for text in self.rng.sample(told, min(len(told), self.rng.randint(3, 6)))]

    def sum_prose(self):
        tellings = [self.sum() for _ in range(self.rng.randint(2, 5))]
        return [self.rng.choice(prose).format(**details) for (prose, _, _), details in tellings]

    def sort_prose(self):
        tellings = [self.sort() for _ in range(self.rng.randint(2, 3))]
        return [self.rng.choice(prose).format(**details) for (prose, _, _), details in tellings]

    def rewrite_prose(self):
        tellings = [self.rewrite() for _ in range(self.rng.randint(1, 2))]
        return [
            details["old"] + " " + self.rng.choice(links).format(**details)
            for (links, _, _), details in tellings
        ]

    def story_prose(self):
        sentences, recalls, _ = self.rng.choice(STORIES)
        details = self.details()
        told = (
            sentences
            + self.rng.sample(CHATTER, self.rng.randint(0, 1))
            + self.rng.sample(recalls, self.rng.randint(2, 4))
        )
        return [capital(text.format(**details)) for text in told]

    def memory_prose(self):
        details = self.details()
        who, listener = details["who"], details["who3"]
        heard = self.rng.sample(list(MEMORIES.values()), 3)
        said = " ".join(self.rng.choice(says) for says, *_ in heard).format(**details)
        kept = joined([report for _, report, *_ in self.rng.sample(heard, 2)]).format(**details)
        recall = self.rng.choice(
            [
                f"{listener} remembered that {who} {kept}.",
                f'"So you {kept}," said {listener}.',
                f"{listener} told everyone that {who} {kept}.",
            ]
        )
        return [
            f'"Hello, my name is {who}. {said}" With these words {who} came up to {listener}.',
            self.rng.choice(CHATTER),
            recall,
        ]

    def loose_clause(self):
        subjects, form = self.rng.choice([(SPEAKERS, 0), (OTHERS, 1)])
        parts = [
            self.rng.choice(subjects),
            self.rng.choice(DOINGS).split("/")[form],
            *self.rng.sample(WHATS, self.rng.randint(0, 1)),
            *self.rng.sample(WAYS, self.rng.randint(0, 2)),
        ]
        return " ".join(parts).format(**self.details())

    def loose_prose(self):
        sentences = []
        for _ in range(self.rng.randint(2, 4)):
            clauses = self.rng.choice(
                [self.loose_clause(), f"{self.loose_clause()}{self.rng.choice(LINKS)} {self.loose_clause()}"]
            )
            sentences.append(
                capital(f"{self.rng.choice(OPENINGS)} {clauses}".strip()) + self.rng.choice("...!?")
            )
        return sentences

    def parrot_prose(self):
        who, who2 = self.rng.sample(NAMES, 2)
        heard = " ".join(self.rng.choices(WORDS, k=self.rng.randint(3, 12)))
        mark = self.rng.choice(".,:;!?")
        return [
            self.rng.choice(
                [
                    f'"{heard}{mark}" called {who}. "{heard}{mark}" called the parrot.',
                    f"{who} said {heard}{mark} The parrot said {heard}{mark}",
                    f"{heard}{mark}\n{heard}{mark}",
                    f'The parrot of {who} heard "{heard}" and told {who2} "{heard}" as well.',
                ]
            )
        ]

    def document(self):
        tellers = [
            self.fact_prose,
            self.sum_prose,
            self.sort_prose,
            self.rewrite_prose,
            self.story_prose,
            self.memory_prose,
            self.loose_prose,
            self.parrot_prose,
        ]
        paragraphs = [
            " ".join(teller())
            for teller in self.rng.choices(tellers, [8, 4, 3, 3, 4, 2, 4, 3], k=self.rng.randint(1, 3))
        ]
        return self.rng.choice(["\n", "\n\n"]).join(paragraphs)

    # Conversations. A task is (what to do, the material to do it with or "", the answer).

    def fact_task(self):
        kind = self.rng.choices(list(self.facts), [12, 4, 1, 2, 2])[0]
        asks, answer = self.rng.choice(FACTS[kind])
        fact = self.rng.choice(self.facts[kind])
        return self.rng.choice(asks).format(**fact), "", answer.format(**fact)

    def sum_task(self):
        (_, asks, answer), details = self.sum()
        return self.rng.choice(asks).format(**details), "", answer.format(**details)

    def sort_task(self):
        (_, asks, answer), details = self.sort()
        return self.rng.choice(asks), details["mixed"], answer.format(**details)

    def rewrite_task(self):
        (_, asks, answer), details = self.rewrite()
        return self.rng.choice(asks), details["old"], answer.format(**details)

    def read_task(self):
        sentences, _, questions = self.rng.choice(STORIES)
        asks, answer = self.rng.choice(questions)
        details = self.details()
        return (
            self.rng.choice(asks).format(**details),
            " ".join(sentences).format(**details),
            answer.format(**details),
        )

    def memory_talk(self):
        details = self.details()
        topics = self.rng.sample(list(MEMORIES), 2)
        says = [self.rng.choice(MEMORIES[topic][0]).format(**details) for topic in topics]
        greeting = self.rng.choice(
            ["Hello, I am {who}.", "My name is {who}.", "Good day, {who} here."]
        ).format(**details)
        if self.rng.random() < 0.6:
            talk = [
                f"{greeting} {says[0]} {says[1]}",
                f"Welcome, {details['who']}, I will remember {topics[0]} and {topics[1]}.",
            ]
        else:
            talk = [
                f"{greeting} {says[0]}",
                f"Welcome, {details['who']}, I will remember {topics[0]}.",
                says[1],
                f"Thank you, {details['who']}, I will remember {topics[1]}, too.",
            ]
        _, _, asks, answer = MEMORIES[self.rng.choice(topics)]
        return [
            *talk,
            self.rng.choice(asks),
            f"You told me, {details['who']}, that {answer}.".format(**details),
        ]

    def fact_talk(self):
        person = self.rng.choice(self.facts["person"])
        (asks, answer), (_, answer2) = _, second = self.rng.sample(FACTS["person"], 2)
        follow = {
            0: ["And where is the home?", "And which town is it?"],
            1: ["And what is the trade?", "And what work is done there?"],
            2: ["And which animal is kept?", "And what about an animal?"],
        }[FACTS["person"].index(second)]
        return [
            self.rng.choice(asks).format(**person),
            answer.format(**person),
            self.rng.choice(follow),
            answer2.format(**person),
        ]

    def sum_talk(self):
        details = dict(self.details(), a=self.rng.randint(2, 40), b=self.rng.randint(2, 40))
        details["c"] = details["a"] + details["b"]
        start = self.rng.choice(
            [
                "I have {a} {things} in my {bag}.",
                "There are {a} {things} in my {bag}.",
                "My {bag} holds {a} {things}.",
            ]
        )
        more = self.rng.choice(
            [
                "I put in {b} more. How many are there now?",
                "Now I add {b}. What is the total?",
                "{b} are added. Count them.",
            ]
        )
        talk = [
            start,
            "I see, your {bag} holds {a} {things} so far.",
            more,
            "Your {bag} now holds {c} {things}, because {a} plus {b} is {c}.",
        ]
        return [text.format(**details) for text in talk]


def documents(count, seed):
    world = World(seed, "prose")
    return [world.document() for _ in range(count)]


def conversations(rows, seed):
    """The three parts, `rows` rows each, in the schemas of Alpaca, Tulu and UltraChat."""
    world, seen = World(seed, "conversations"), set()
    tasks = dict(
        facts=world.fact_task,
        sums=world.sum_task,
        sorting=world.sort_task,
        rewriting=world.rewrite_task,
        reading=world.read_task,
    )
    talks = [world.memory_talk, world.fact_talk, world.memory_talk, world.sum_talk]

    def unseen(make, prompt_of):
        while True:
            made = make()
            if prompt_of(made) not in seen:
                seen.add(prompt_of(made))
                return made

    parts = {"alpaca": [], "tulu": [], "ultrachat": []}
    for row in range(rows):
        kind = list(tasks)[row % len(tasks)]
        ask, material, answer = unseen(tasks[kind], lambda task: prompt(*task[:2]))
        parts["alpaca"].append(dict(instruction=ask, input=material, output=answer))

        ask, material, answer = unseen(tasks[kind], lambda task: prompt(*task[:2]))
        messages = [dict(role="system", content=SYSTEM)] if world.rng.random() < 0.1 else []
        messages += [dict(role="user", content=prompt(ask, material)), dict(role="assistant", content=answer)]
        parts["tulu"].append(dict(dataset=kind, id=f"tulu-{row:04d}", messages=messages))

        talk = unseen(talks[row % len(talks)], lambda talk: talk[0])
        messages = [
            dict(role=("user", "assistant")[turn % 2], content=text) for turn, text in enumerate(talk)
        ]
        parts["ultrachat"].append(dict(prompt=talk[0], prompt_id=f"ultrachat-{row:04d}", messages=messages))
    return parts
