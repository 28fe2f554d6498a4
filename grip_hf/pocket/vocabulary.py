"""The words of the pocket world. Everything else in this package derives its sizes from these tuples."""

# fmt: off
CATEGORIES = (
    "cat", "dog", "cow", "pig", "bear", "frog", "tiger", "rabbit", "penguin", "koala", "elephant", "chicken",
    "owl", "duck", "fish", "whale", "octopus", "crab", "snail", "bee", "butterfly", "turtle", "tulip", "rose",
    "sunflower", "cactus", "mushroom", "corn", "tomato", "eggplant", "grapes", "lemon", "banana", "pineapple",
    "apple", "pear", "cherries", "hamburger", "pizza", "doughnut", "cookie", "carrot", "egg", "broccoli",
    "avocado", "coffee", "guitar", "trumpet", "violin", "crown", "boot", "ring", "gem", "bulb", "bomb", "key",
    "lock", "bell", "hammer", "candle", "door", "bed", "scissors", "book", "camera", "umbrella", "balloon",
    "gift", "bus", "taxi", "truck", "tractor", "bike", "airplane", "rocket", "anchor", "house", "snowman", "star",
    "fire",
)
# fmt: on
PLATES = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 222, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 50, 170),
    "black": (28, 28, 30),
    "white": (245, 245, 245),
}
COLOURS = tuple(PLATES)
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
VOWELS = tuple("aeiou")
CONSONANTS = tuple(letter for letter in LETTERS if letter not in VOWELS)
WORD_LENGTH = 3
NUMBERS = ("one", "two", "three", "four")
SIDES = ("left", "right", "above", "below")
ROWS = ("top", "bottom")
COLUMNS = ("left", "right")

# fmt: off
FILLER = (
    "is", "there", "any", "in", "this", "picture", "which", "colour", "behind", "what", "object", "on", "plate",
    "under", "the", "one", "of", "these", "do", "you", "see", "how", "many", "times", "from", "where", "corner",
    "word", "written", "yes", "no",
)
# fmt: on
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


MORE = ("larger", "or", "has")  # of the second testbed


def vocabulary(more: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All tokens of a pocket tokenizer, special ones first, each once, in a fixed order; `more` words come last."""
    words = (*SPECIAL, *CATEGORIES, *COLOURS, *LETTERS, *NUMBERS, *SIDES, *ROWS, *COLUMNS, *FILLER, *more)
    return tuple(dict.fromkeys(words))
