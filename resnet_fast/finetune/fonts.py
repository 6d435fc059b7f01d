"""Names of classes in a picture: every script that an installed font has, and a number where none has it."""

from collections.abc import Sequence

from resnet_fast.utils.optional import require


def labels_and_fonts(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names, a number in place of each that no font here can write, and the font families that write them all."""
    manager = require("matplotlib.font_manager", "the confusion matrix")
    fonts = ["DejaVu Sans"]  # matplotlib brings it
    missing = _not_in(manager.findfont(fonts[0]), {character for name in names for character in name})
    for font in manager.fontManager.ttflist:
        if not missing:
            break
        rest = missing if "Last Resort" in font.name else _not_in(font.fname, missing)
        if rest != missing:
            fonts.append(font.name)
            missing = rest
    return [str(number) if missing & set(name) else name for number, name in enumerate(names)], fonts


def _not_in(file: str, characters: set[str]) -> set[str]:
    try:
        font = require("matplotlib.ft2font", "the confusion matrix").FT2Font(file)
    except (OSError, RuntimeError):  # what FreeType cannot read
        return characters
    if not font.scalable:  # pictures of a fixed size, as emojis are
        return characters
    return {character for character in characters if not font.get_char_index(ord(character))}
