"""Which sprites and photos the embedded data set is made of, and which split each of them belongs to.

The files lie inside two installed packages and are read as data; neither package is imported (arcade's own needs are
not installed). A split owns whole poses: where a sprite exists in several colours or with an outline, all of these are
on the same side, and mirrored poses (both climbing frames, say) are never divided, because images are flipped.

Licences: arcade's sprites are CC0, by Kenney (www.kenney.nl). The photos are CC0, in the public domain or
without known copyright restrictions, as scikit-image's documentation states for each; NOTICE names them one by one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

SPLITS = ("train", "validation")


class EmbeddedSourceMissing(RuntimeError):
    """A package whose files the embedded data set is composed of is not installed."""

    exit_code = 4


_WALKERS = "climb0 climb1 fall idle walk0 walk1 walk2 walk3 walk7", "jump walk4 walk5 walk6"
_NUMBERS = "2 4 5 6 7 9 10 A J K", "3 8 Q"
_SUITS = ("Clubs", "Diamonds", "Hearts", "Spades")


@dataclass(frozen=True, kw_only=True)
class SpriteClass:
    """One object class: its sprite files in either split and how far a sprite of it may be turned."""

    name: str
    train: tuple[str, ...]
    """Paths below arcade's image folder, without the suffix ``.png``."""
    validation: tuple[str, ...]
    max_rotation_degrees: int = 12

    def files(self, split: str) -> tuple[str, ...]:
        return self.train if split == "train" else self.validation


def _paths(folder: str, *names: str) -> tuple[str, ...]:
    """``folder/name`` for each blank-separated name."""
    return tuple(f"{folder}/{name}" for group in names for name in group.split())


def _walker(name: str, folder: str, prefix: str) -> SpriteClass:
    train, validation = (
        tuple(f"animated_characters/{folder}/{prefix}_{pose}" for pose in poses.split()) for poses in _WALKERS
    )
    return SpriteClass(name=name, train=train, validation=validation)


def _cards(numbers: str) -> tuple[str, ...]:
    return tuple(f"cards/card{suit}{number}" for suit in _SUITS for number in numbers.split())


def _card_backs(designs: str) -> tuple[str, ...]:
    return tuple(
        f"cards/cardBack_{colour}{design}" for colour in ("blue", "green", "red") for design in designs.split()
    )


SPRITE_CLASSES = (
    _walker("woman", "female_person", "femalePerson"),
    _walker("man", "male_person", "malePerson"),
    _walker("female_adventurer", "female_adventurer", "femaleAdventurer"),
    _walker("male_adventurer", "male_adventurer", "maleAdventurer"),
    _walker("robot", "robot", "robot"),
    _walker("zombie", "zombie", "zombie"),
    SpriteClass(
        name="alien",
        train=_paths("alien", "alienBlue_climb1 alienBlue_climb2 alienBlue_front alienBlue_walk1 alienBlue_fall"),
        validation=_paths("alien", "alienBlue_jump alienBlue_walk2"),
    ),
    SpriteClass(
        name="slime",
        train=_paths("enemies", "slimeBlue slimeGreen slimePurple slimeBlock"),
        validation=_paths("enemies", "slimeBlue_move"),
    ),
    SpriteClass(
        name="worm",
        train=_paths("enemies", "wormGreen wormPink wormGreen_dead"),
        validation=_paths("enemies", "wormGreen_move"),
        max_rotation_degrees=20,
    ),
    SpriteClass(
        name="coin",
        train=_paths("items", "coinBronze coinGold coinSilver gold_1 gold_3"),
        validation=_paths("items", "coinSilver_test gold_2"),
        max_rotation_degrees=30,
    ),
    SpriteClass(
        name="flag",
        train=_paths("items", "flagGreen1 flagRed1 flagYellow1 flagGreen_down flagRed_down flagYellow_down"),
        validation=_paths("items", "flagGreen2 flagRed2 flagYellow2"),
    ),
    SpriteClass(
        name="meteor",
        train=_paths(
            "space_shooter",
            "meteorGrey_big1 meteorGrey_big2 meteorGrey_big3 meteorGrey_med1 meteorGrey_small1",
        ),
        validation=_paths("space_shooter", "meteorGrey_big4 meteorGrey_med2 meteorGrey_small2"),
        max_rotation_degrees=180,
    ),
    SpriteClass(
        name="spaceship",
        train=_paths(
            "space_shooter",
            "playerShip1_blue playerShip1_green playerShip1_orange playerShip3_orange",
            "playerLife1_blue playerLife1_green playerLife1_orange",
        ),
        validation=_paths("space_shooter", "playerShip2_orange"),
        max_rotation_degrees=180,
    ),
    SpriteClass(
        name="tank",
        train=_paths(
            "topdown_tanks",
            "tank_blue tank_dark tank_green tank_red tank_sand tankBody_bigRed tankBody_bigRed_outline",
            "tankBody_blue tankBody_blue_outline tankBody_dark tankBody_dark_outline tankBody_green",
            "tankBody_green_outline tankBody_red tankBody_red_outline tankBody_sand tankBody_sand_outline",
        ),
        validation=_paths(
            "topdown_tanks",
            "tankBody_darkLarge tankBody_darkLarge_outline tankBody_huge tankBody_huge_outline",
        ),
        max_rotation_degrees=180,
    ),
    SpriteClass(
        name="playing_card",
        train=(*_cards(_NUMBERS[0]), "cards/cardJoker"),
        validation=_cards(_NUMBERS[1]),
        max_rotation_degrees=25,
    ),
    SpriteClass(
        name="card_back", train=_card_backs("1 2 3 5"), validation=_card_backs("4"), max_rotation_degrees=25
    ),
)  # fmt: skip

# Things that look like the classes but are none: without them every cartoon edge on a photo would be an object.
_CLUTTER = {
    "train": (
        *_paths("enemies", "bee fishGreen fishPink frog frog_move saw mouse"),
        *_paths("items", "gemBlue gemGreen gemRed gemYellow star"),
        *_paths("tiles", "boxCrate_double bush cactus grassHalf signLeft signRight leverLeft leverRight switchGreen"),
        *_paths("tiles", "switchRed torch1 torch2 dirtCliff_left dirtCliff_right snow_pile stoneHalf brickBrown"),
        *_paths("topdown_tanks", "treeGreen_large treeBrown_large tracksLarge"),
    ),
    "validation": (
        *_paths("enemies", "fly ladybug sawHalf"),
        *_paths("items", "keyBlue keyGreen keyRed keyYellow ladderTop"),
        *_paths("tiles", "boxCrate rock mushroomRed plantPurple bomb signExit leverMid torchOff lockRed lockYellow"),
        *_paths("tiles", "doorClosed_mid planetHalf sandHill_left sandHill_right spikes"),
        *_paths("topdown_tanks", "treeGreen_small treeBrown_small tracksSmall"),
    ),
}

# Only photos whose licence scikit-image states: its stereo pair and its moon come without one.
_PHOTOS = {
    "train": (
        "astronaut.png", "brick.png", "cell.png", "clock_motion.png", "grass.png", "hubble_deep_field.jpg", "ihc.png",
        "rocket.jpg", "text.png",
    ),
    "validation": ("camera.png", "chelsea.png", "coffee.png", "gravel.png", "retina.jpg"),
}  # fmt: skip


@cache
def _package_folder(package: str, *below: str) -> Path:
    """The folder of an installed package's files, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EmbeddedSourceMissing(
            f"the embedded data set needs the package {package}, whose files it is composed of, and it is not "
            f"installed; `make train-export-deploy` installs it, or name a data set of your own with dataset.train=..."
        )
    return Path(spec.origin).parent.joinpath(*below)


def sprite_folder() -> Path:
    return _package_folder("arcade", "resources", "assets", "images")


def photo_folder() -> Path:
    return _package_folder("skimage", "data")


@cache
def object_sprites(split: str) -> tuple[tuple[Path, ...], ...]:
    """The sprite files of each class, in the order of :data:`SPRITE_CLASSES`."""
    folder = sprite_folder()
    return tuple(tuple(folder / f"{file}.png" for file in entry.files(split)) for entry in SPRITE_CLASSES)


@cache
def clutter_sprites(split: str) -> tuple[Path, ...]:
    """Sprites that are pasted but belong to no class."""
    folder = sprite_folder()
    return tuple(folder / f"{file}.png" for file in _CLUTTER[split])


@cache
def photos(split: str) -> tuple[Path, ...]:
    """Background photos."""
    return tuple(photo_folder() / file for file in _PHOTOS[split])


def source_files(split: str) -> tuple[Path, ...]:
    """Every file that the images of a split are made of; the two splits share none, by name or by content."""
    return (*(file for files in object_sprites(split) for file in files), *clutter_sprites(split), *photos(split))


@cache
def photo(path: Path) -> Image.Image:
    """A photo, brought to at most 640 pixels so that a crop of it costs little."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.BOX)
    return image


@cache
def sprite(path: Path) -> Image.Image:
    """A sprite (RGBA) without its transparent border."""
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha >= 128)).getbbox())
