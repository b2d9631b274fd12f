"""The nouns that serve as labels and as table keys, one token each."""

from __future__ import annotations

WORDS: tuple[str, ...] = tuple(
    """
    ape arm ash bay bead bench bike boar bolt bone book bread brick brook brush bud cat chain
    chair cheek chest chick claw cliff clip clock cloth coal coat cone cord cork corn couch cow
    crane crew crow cub cup deer den dew dice dish dog doll door eel egg elf elk elm farm fig film
    fin flag flask fly fog fruit fur glove glue gold grape grass guitar gull hand hat hawk hive
    hoe hood horse ink inn isle ivy jay jet jug kelp key king knee knot lake lark lawn lily lime
    log loom lynx map mare mast mat milk mist moon moth mouse mud nail nest nose nut oil palm pan
    park paw pear pin plate plum pond post rain ram rat rice ring river robe rock roof rope sand
    seal seed sheep ship shirt skate sled stem swan tent tool tower town tray trunk tulip vase
    vest wand wasp wax well wolf wool worm yak yard
    """.split()  # noqa: SIM905
)

assert len(set(WORDS)) == len(WORDS)
