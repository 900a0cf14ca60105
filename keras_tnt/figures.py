"""Figures of matplotlib: text of any script, and files that are whole or not there."""

import contextlib
import functools
import logging
import os

from keras_tnt.files import replacing
from keras_tnt.text import printable


def drawable(text):
    """Text as figures show it: what no installed font can draw stands as `\\u732b` and the like.

    Dollars are escaped: matplotlib takes what stands between two for mathematics.
    """
    shown = "".join(c if family_of(c) else escape(c) for c in printable(text))
    return shown.replace("$", r"\$")


def escape(character):
    return character.encode("unicode_escape").decode("ascii")


@functools.cache
def family_of(character):
    """The family of a font that can draw a character: matplotlib's own before others; or None."""
    from matplotlib import font_manager

    default = font_manager.findfont(font_manager.FontProperties())
    if ord(character) in characters(default):
        return font_manager.get_font(default).family_name
    # Not matplotlib's list of fonts, which it keeps while fonts come and go.
    for path in sorted(font_manager.findSystemFonts()):
        if ord(character) in characters(path):
            font_manager.fontManager.addfont(path)
            return font_manager.get_font(path).family_name
    return None


@functools.cache
def characters(path):
    """The code points that a font file can draw."""
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that was removed, or is damaged
        return frozenset()


def save(figure, path, **options):
    """Write a figure in the format that the path's ending names; PNG without one.

    Args:
        figure: of matplotlib. Its texts get the fonts that they need, each behind the one it has.
        path: file to write, whole or not at all.
        options: of `savefig`, such as `dpi`.
    """
    from matplotlib.text import Text

    for axes in figure.axes:
        axes.get_xticklabels(), axes.get_yticklabels()  # makes the labels' text
    for text in figure.findobj(Text):
        needed = {family_of(c) for c in text.get_text() if not c.isspace()} - {None}
        had = text.get_fontfamily()
        text.set_fontfamily([*had, *sorted(needed - set(had))])
    with replacing(path) as temporary, silent("matplotlib.font_manager"):
        figure.savefig(
            temporary, format=os.path.splitext(temporary)[1].lstrip(".") or "png", **options
        )


@contextlib.contextmanager
def silent(name):
    """Without a logger's warnings: of a font that has one weight alone, each text would tell."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
