"""Word lists that planted facts are made of."""

import random


def _words(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _words(
    """
    amber ancient autumn bitter blue bright broken bronze calm copper crimson crooked
    curious distant dusty eastern emerald empty faded frozen gentle golden green hidden
    hollow humble iron ivory jade jolly lonely lower lucky marble merry misty modest narrow
    northern olive orange pale patient polar purple quiet rapid red restless royal rusty
    sandy scarlet secret silent silver sleepy southern stone sunny swift tall velvet violet
    wandering western white wild winter wooden yellow young
    """
)

PLACES = _words(
    """
    abbey archive attic bakery balcony barn basement bridge cabin canal castle cathedral
    cave cellar chapel clinic college cottage courtyard depot diner dock factory farm ferry
    forge fountain gallery garage garden gate greenhouse hall harbour hospital hotel inn
    island kitchen laboratory library lighthouse lobby market meadow mill museum nursery
    observatory office orchard palace pantry pavilion pier plaza pond quarry school shop
    stable stadium station studio temple terrace theatre tower tunnel vault village
    warehouse well workshop
    """
)

ANIMALS = _words(
    """
    badger bear beaver bison camel cat crane crow deer dolphin eagle falcon ferret fox frog
    gecko goat goose hare hawk heron horse koala lemur lion llama lynx magpie mole monkey
    moose newt otter owl panda parrot pigeon pony puffin rabbit raven salmon seal shark
    sheep sparrow spider squid stork swan tiger toad trout turtle walrus weasel whale wolf
    wombat zebra
    """
)

NAMES = _words(
    """
    Ada Alan Amir Anna Bela Bruno Carla Chen Clara Dana David Diego Elena Emil Erik Fatima
    Felix Grace Greta Hana Hugo Ines Iris Ivan Jana Jonas Julia Kofi Lars Laura Leila Leo
    Lina Lucas Mara Marco Maya Mina Nadia Nina Noah Olga Omar Oscar Paula Pavel Petra Priya
    Ravi Rosa Ruth Samir Sara Simon Sofia Tara Theo Tomas Vera Victor Wanda Yusuf Zoe
    """
)

CODE_NAMES = _words(
    """
    alpha bravo cedar delta ember flint grove haven indigo jasper karma lotus maple nova
    onyx pearl quartz raven sable terra umber vega willow xenon yarrow zephyr
    """
)

MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)


def place(rng: random.Random) -> str:
    """Name a place, like `rusty lighthouse`: one of about 6,000."""
    return f"{rng.choice(ADJECTIVES)} {rng.choice(PLACES)}"


def distinct_places(rng: random.Random, count: int) -> list[str]:
    """Name `count` different places."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[place(rng)] = None
    return list(found)


def digits(rng: random.Random, count: int = 5) -> str:
    """Draw a number of `count` digits, as text."""
    return str(rng.randrange(10 ** (count - 1), 10**count))
